"""No offset wraps at 2**31 elements: tensors that are mostly holes, with something at both ends."""

import mmap
from typing import Any

import pytest
import routed_cases
import torch
from routed_cases import Case
from torch import Tensor
from triton_cases import DEVICE, close, definition

from moeroute_kernels import grouped_mm, reference, routed_mlp
from moeroute_kernels.cpu_routed_mlp import Form

pytest.importorskip("triton", reason="the kernels are written in Triton")

from moeroute_kernels._triton import combine as combine_kernels
from moeroute_kernels._triton import weights as weight_kernels
from moeroute_kernels._triton.form import device_form
from moeroute_kernels._triton.mlp_inner import mlp_inner
from moeroute_kernels._triton.mlp_up import mlp_up
from moeroute_kernels._triton.rows import mm_rows
from moeroute_kernels._triton.tiles import TileMap

pytestmark = pytest.mark.usefixtures("triton_ops")
LIMIT = 2**31
DTYPE = torch.float16
NEEDED_BYTES = 40 * 2**30
WIDTH, LAST = 64, 3
ROWS = LIMIT // WIDTH + LAST
"""So many rows of that width that the last ones lie beyond the limit."""


@pytest.fixture(autouse=True)
def enough_memory() -> None:
    """Holes cost nothing on a CPU; a GPU has none."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < NEEDED_BYTES:
        pytest.skip("needs 43 GB of the device's memory")


def holes(num: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of zeros; on a CPU, memory only for what is written."""
    if DEVICE == "cuda":
        return torch.zeros(num, dtype=dtype, device=DEVICE)
    return torch.frombuffer(mmap.mmap(-1, num * dtype.itemsize), dtype=dtype)


def spread(tensor: Tensor) -> Tensor:
    """The same numbers; the last entry of the first axis begins beyond the limit."""
    entries, size = tensor.shape[0], tensor[0].numel()
    gap = LIMIT // (entries - 1) + WIDTH
    flat = holes((entries - 1) * gap + size, tensor.dtype)
    result = torch.as_strided(flat, tensor.shape, (gap, *tensor.stride()[1:]))
    return result.copy_(tensor)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).to(DTYPE)


def test_grouped_mm():
    x, weight, bias = randn(6, 16), randn(3, 8, 16), randn(3, 8)
    ends = torch.tensor([2, 3, 6], dtype=torch.int32)
    seen = grouped_mm(spread(x), spread(weight), ends.to(DEVICE), spread(bias))
    expected = reference.grouped_mm(x.double(), weight.double(), ends, bias.double())
    close("grouped_mm", seen, expected, "output", DTYPE)


def test_routed_mlp():
    """Forward and backward, every input and the gradient spread."""
    case = Case(5, 2, 3, 24, 16, bias=True, dtype=DTYPE)
    inputs = routed_cases.make(case)
    drawn = inputs.differentiable
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in drawn.items()}
    given = {
        name: (tensor.to(DEVICE) if name == "weights" else spread(tensor.detach()))
        for name, tensor in inputs.on(DEVICE).differentiable.items()
    }
    given = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    gradient = randn(case.tokens, case.hidden)
    seen = inputs.on(DEVICE).call(routed_mlp, given)
    expected = inputs.call(reference.routed_mlp, exact)
    close("routed_mlp", seen, expected, "output", DTYPE)
    found = torch.autograd.grad(seen, list(given.values()), spread(gradient).to(DEVICE))
    truth = torch.autograd.grad(expected, list(exact.values()), gradient.double())
    for name, a, b in zip(given, found, truth, strict=True):
        close("routing weights" if name == "weights" else "routed_mlp", a, b, name, DTYPE)
    with torch.no_grad():
        alone = inputs.on(DEVICE).call(routed_mlp, given)
    close("routed_mlp", alone, definition(inputs), "inference", DTYPE)


def test_combine():
    rows, scale = randn(6, 16), torch.rand(3, 2)
    inverse = torch.tensor([5, 0, 3, 1, 2, 4])
    ends = torch.tensor([2, 6], dtype=torch.int32)
    place = inverse.to(DEVICE), ends.to(DEVICE)
    seen = combine_kernels.combine(spread(rows), *place, 3, scale=scale.to(DEVICE))
    exact = [rows.double().requires_grad_(), scale.double().requires_grad_()]
    expected = reference.combine(*exact, inverse, ends)
    close("combine", seen, expected, "output", DTYPE)
    gradient = randn(3, 16)
    found = combine_kernels.combine_backward(
        spread(gradient), spread(rows), scale.to(DEVICE), *place, [True, True]
    )
    truth = torch.autograd.grad(expected, exact, gradient.double())
    for a, b in zip(found, truth, strict=True):
        close("combine", a, b, "gradient", DTYPE)


def test_gradients_of_weights_and_biases():
    left, right = randn(6, 16), randn(6, 24)
    ends = torch.tensor([2, 6], dtype=torch.int32, device=DEVICE)
    out = spread(torch.full((2, 16, 24), float("nan"), dtype=DTYPE))
    turns = weight_kernels.longest_first(ends)
    weight_kernels.mm_weights(spread(left), spread(right), ends, turns, out)
    bias = weight_kernels.sum_rows(spread(left), ends, randn(2, 16).to(DEVICE))
    for expert, part in enumerate((slice(0, 2), slice(2, 6))):
        exact = left[part].double().t() @ right[part].double()
        close("grouped_mm", out[expert], exact, "weight", DTYPE)
        close("grouped_mm", bias[expert], left[part].double().sum(0), "bias", DTYPE)


class TestLastRows:
    """What is written beyond the limit: one tile, at the end of many rows."""

    @staticmethod
    def tiles() -> TileMap:
        start, end = ([number] for number in (ROWS - LAST, ROWS))
        experts, starts, ends = (
            torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in ([0], start, end)
        )
        return TileMap(experts, starts, ends, 128)

    @pytest.fixture
    def hollow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the kernels' callers allocate is made of holes, too."""
        if DEVICE == "cuda":
            return

        def empty(shape: Any, *, dtype: torch.dtype, device: Any = None) -> Tensor:
            shape = (shape,) if isinstance(shape, int) else shape
            num = torch.Size(shape).numel()
            return holes(num, dtype).view(shape) if num else torch.zeros(shape, dtype=dtype)

        def new_empty(self: Tensor, shape: Any, **_: Any) -> Tensor:
            return empty(shape, dtype=self.dtype)

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(Tensor, "new_empty", new_empty)

    @staticmethod
    def last(tensor: Tensor, numbers: Tensor) -> Tensor:
        """Write the last rows of a tensor of holes."""
        tensor[-LAST:] = numbers.to(tensor.device)
        return tensor

    def test_product(self, hollow: None):
        numbers, weight = randn(LAST, 16), randn(1, WIDTH, 16)
        rows = self.last(holes(ROWS * 16, DTYPE).view(ROWS, 16), numbers)
        out = mm_rows(rows, weight.to(DEVICE), self.tiles(), num_rows=ROWS)
        expected = numbers.double() @ weight[0].double().t()
        close("grouped_mm", out[-LAST:], expected, "last rows", DTYPE)

    def test_routed_mlp_both_ways(self, hollow: None):
        """The pre-activation, the activated rows, and both as backward makes them."""
        form = device_form(Form("relu", False, 1.0, 1.0))
        x, up, down = randn(LAST, 16), randn(1, WIDTH, 16), randn(1, 16, WIDTH)
        order = self.last(holes(ROWS, torch.int64), torch.arange(LAST))
        scale = self.last(holes(ROWS, torch.float32).view(ROWS, 1), torch.zeros(LAST, 1))
        scale[:LAST] = torch.tensor([[0.5], [1.0], [2.0]])
        share = scale[:LAST].cpu().double()
        pre, out = mlp_up(
            x.to(DEVICE), up.to(DEVICE), None, scale, order, self.tiles(), form, keep=True
        )
        exact = x.double() @ up[0].double().t()
        close("routed_mlp", pre[-LAST:], exact, "pre-activation", DTYPE)
        close("routed_mlp", out[-LAST:], exact.relu() * share, "activated", DTYPE)
        activated, dpre, _ = mlp_inner(
            x.to(DEVICE),
            down.to(DEVICE),
            None,
            scale,
            pre,
            order,
            self.tiles(),
            form,
            (True, True, False),
        )
        inner = x.double() @ down[0].double() * share
        close("routed_mlp", activated[-LAST:], exact.relu() * share, "activated again", DTYPE)
        close("routed_mlp", dpre[-LAST:], inner * (exact > 0), "its gradient", DTYPE)
