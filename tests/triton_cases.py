"""Comparing the Triton kernels with the definition, on a GPU where there is one.

The kernels' tensors live on `DEVICE`; the definition is computed in float64 on the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import routed_cases
import torch
from routed_cases import Case, Inputs
from tolerances import relative_error, tolerance
from torch import Tensor

from moeroute_kernels import reference, routed_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the kernels run: compiled on a GPU, or in Triton's interpreter on the CPU."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def close(
    op: str,
    seen: Tensor,
    expected: Tensor,
    what: str,
    dtype: torch.dtype,
    *,
    slack: float = 1.0,
) -> None:
    """Compare; the interpreter cuts bfloat16 off where a device rounds, and errs thrice as far."""
    cut = 3.0 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1.0
    # float16 is rounded between products here, on a CPU it is not: three bits more than bfloat16
    share = 1 / 8 if dtype == torch.float16 else 1.0
    row = torch.bfloat16 if dtype == torch.float16 else dtype
    allowed = tolerance(op, row) * cut * share * slack
    assert seen.shape == expected.shape
    assert torch.isfinite(seen).all(), f"{op}: {what} is not finite"
    error = relative_error(seen.cpu(), expected)
    assert error <= allowed, f"{op}: {what} is off by {error:.2e}, allowed {allowed:.0e}"


def check(case: Case, device: str = DEVICE, *, slack: float = 1.0) -> None:
    """Compare the output and every gradient of a routed MLP."""
    for name, (seen, expected) in routed_cases.both_sides(case, device).items():
        op = "routing weights" if name == "weights" else "routed_mlp"
        close(op, seen, expected, name, case.dtype, slack=slack)


def check_inference(case: Case, device: str = DEVICE, *, slack: float = 1.0) -> None:
    """Compare the output of a routed MLP that keeps nothing for backward."""
    inputs = routed_cases.make(case)
    with torch.no_grad():
        seen = inputs.on(device).call(routed_mlp)
        expected = definition(inputs)
    close("routed_mlp", seen, expected, "output", case.dtype, slack=slack)


def definition(inputs: Inputs) -> Tensor:
    """The output of the float64 reference on the CPU."""
    exact = {name: tensor.detach().double() for name, tensor in inputs.differentiable.items()}
    return inputs.call(reference.routed_mlp, exact)


def compare(op: str, seen: Tensor, expected: Tensor, new: list[Tensor], old: list[Tensor]) -> None:
    """Compare the output and, under one gradient, the gradients of `new` and `old`."""
    close(op, seen, expected, "output", seen.dtype)
    gradient = torch.randn(seen.shape).to(seen.dtype)
    found = torch.autograd.grad(seen, new, gradient.to(seen.device))
    exact = torch.autograd.grad(expected, old, gradient.to(expected.dtype))
    for number, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert a.dtype == new[number].dtype
        close(op, a, b, f"gradient {number}", seen.dtype)


def leaves(tensors: list[Tensor], device: str = DEVICE) -> list[Tensor]:
    """The tensors on the device, requiring gradients."""
    return [tensor.detach().to(device).requires_grad_() for tensor in tensors]


def exactly(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers in float64 on the CPU."""
    return [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]


@contextmanager
def counting_launches() -> Iterator[list[str]]:
    """Yield the names of the kernels that are launched, in their order."""
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            _count_interpreted(patch, launched)
        else:
            _count_compiled(patch, launched)
        yield launched


def _count_interpreted(patch: pytest.MonkeyPatch, launched: list[str]) -> None:
    from triton.runtime.interpreter import GridExecutor

    inner = GridExecutor.__call__

    def launch(self: Any, *args: Any, **options: Any) -> None:
        launched.append(self.fn.__name__)
        inner(self, *args, **options)

    patch.setattr(GridExecutor, "__call__", launch)


def _count_compiled(patch: pytest.MonkeyPatch, launched: list[str]) -> None:
    from triton.runtime.jit import JITFunction

    inner: Callable[..., Any] = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        launched.append(self.__name__)
        return inner(self, *args, **options)

    patch.setattr(JITFunction, "run", run)
