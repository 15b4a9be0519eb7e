"""How far a result may lie from its definition: one table, and the one way to compare.

The error is relative and of the whole tensor, |seen - expected| / |expected| in the Euclidean norm,
so that it does not depend on the scale of the data; the expected value is computed in float64 from
the very numbers that the op was given. Changing a number here is a commit of its own, with a
reason.
"""

import torch
from torch import Tensor

# Twice to four times what is seen with the shapes of the tests on a CPU.
FLOAT64 = 1e-13
FLOAT32 = {
    "activation": 1e-6,
    "combine": 4e-7,
    "gated_lora": 1e-6,
    "grouped_mm": 1e-6,
    "routed_mlp": 2e-6,
    "routing weights": 4e-6,
}
# bfloat16 keeps 8 bits, half a unit is 2e-3; a value that is rounded n times errs by about sqrt(n)
# of that. The gradients of the routed MLP pass through three rounded tensors.
BFLOAT16 = {
    "activation": 4e-3,
    "combine": 3e-3,
    "gated_lora": 8e-3,
    "grouped_mm": 3e-3,
    "routed_mlp": 8e-3,
    "routing weights": 2e-2,  # a dot product of two rounded rows, which may cancel
}
# float16 is computed in float32 on a CPU and rounded once; half a unit is 2.4e-4.
FLOAT16 = {
    "combine": 4e-4,
    "gated_lora": 1e-3,
    "grouped_mm": 4e-4,
    "routed_mlp": 4e-4,
    "routing weights": 1e-5,  # never rounded to float16
}


def tolerance(op: str, dtype: torch.dtype) -> float:
    """The largest relative error of an op in a dtype."""
    if dtype == torch.float64:
        return FLOAT64
    return {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}[dtype][op]


def relative_error(seen: Tensor, expected: Tensor) -> float:
    """|seen - expected| / |expected|; 0 if both are zero or empty, infinite if only one is."""
    seen, expected = seen.detach().double(), expected.detach().double()
    difference, scale = (seen - expected).norm().item(), expected.norm().item()
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def assert_close(
    op: str,
    seen: Tensor,
    expected: Tensor,
    what: str = "result",
    dtype: torch.dtype | None = None,
) -> None:
    """Check shape, finiteness and the error, in the tolerance of `dtype` or that of `seen`."""
    assert seen.shape == expected.shape, f"{op}: {what} has shape {tuple(seen.shape)}"
    assert torch.isfinite(seen).all(), f"{op}: {what} is not finite"
    error, allowed = relative_error(seen, expected), tolerance(op, dtype or seen.dtype)
    assert error <= allowed, f"{op}: {what} is off by {error:.2e}, allowed {allowed:.0e}"
