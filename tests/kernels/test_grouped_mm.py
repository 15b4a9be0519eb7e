"""`grouped_mm` equals its definition, and is an op."""

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.library import opcheck

from moeroute_kernels import grouped_mm, reference
from moeroute_kernels.grouped_mm import grouped_mm_backward_op, grouped_mm_op

# rows per expert; rows that belong to nobody; I; O
SHAPES = {
    "even": ([8, 8, 8, 8], 0, 64, 32),
    "odd": ([3, 5, 1, 7, 2, 9, 4], 6, 97, 47),
    "idle": ([0, 4, 0, 0, 30, 0], 3, 32, 24),
    "all idle": ([0, 0, 0], 5, 16, 8),
    "one": ([1, 1, 0, 1], 0, 320, 40),
    "many": ([20, 25, 12, 33], 1, 256, 64),
    "none": ([0, 0], 0, 16, 8),
    "single": ([19], 0, 48, 24),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(
    name: str, dtype: torch.dtype, *, bias: bool = False, transposed: bool = False
) -> tuple[list[Tensor], Tensor]:
    sizes, tail, width, out = SHAPES[name]
    weight = torch.randn(len(sizes), out, width) * width**-0.5
    tensors = [torch.randn(sum(sizes) + tail, width), weight]
    if transposed:
        tensors[1] = weight.transpose(1, 2).contiguous()
    if bias:
        tensors.append(torch.randn(len(sizes), out))
    return [t.to(dtype).requires_grad_() for t in tensors], torch.tensor(sizes).cumsum(0).int()


def call(op: object, tensors: list[Tensor], ends: Tensor, *, transposed: bool) -> Tensor:
    x, weight, *bias = tensors
    return op(x, weight.transpose(1, 2) if transposed else weight, ends, *bias)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_definition(name: str, dtype: torch.dtype, bias: bool, transposed: bool):
    tensors, ends = make(name, dtype, bias=bias, transposed=transposed)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    seen = call(grouped_mm, tensors, ends, transposed=transposed)
    expected = call(reference.grouped_mm, exact, ends, transposed=transposed)
    assert_close("grouped_mm", seen, expected)
    gradient = torch.randn(seen.shape).to(dtype)
    new = torch.autograd.grad(seen, tensors, gradient)
    old = torch.autograd.grad(expected, exact, gradient.double())
    for what, a, b in zip(("x", "weight", "bias"), new, old, strict=False):
        assert_close("grouped_mm", a, b, what)
    filled = int(ends[-1])
    assert not seen[filled:].any()
    assert not new[0][filled:].any()


def test_rows_of_nobody_are_never_read():
    tensors, ends = make("odd", torch.float32)
    filled = int(ends[-1])
    clean = grouped_mm(*tensors, ends)
    with torch.no_grad():
        tensors[0][filled:] = float("nan")
    seen = grouped_mm(*tensors, ends)
    gradient = torch.ones_like(seen)
    gradient[filled:] = float("nan")
    found = torch.autograd.grad(seen, tensors, gradient)
    assert torch.equal(seen, clean)
    assert all(torch.isfinite(t).all() for t in found)


def test_expanded_gradients_and_strided_rows():
    tensors, ends = make("odd", torch.float64)
    expected = torch.autograd.grad(grouped_mm(*tensors, ends).sum(), tensors)
    spread = [torch.stack([t, t], -1).detach()[..., 0].requires_grad_() for t in tensors]
    seen = torch.autograd.grad(grouped_mm(*spread, ends).sum(), spread)
    for a, b in zip(seen, expected, strict=True):
        assert_close("grouped_mm", a, b)


def test_ends_may_be_int64():
    tensors, ends = make("even", torch.float32)
    assert torch.equal(grouped_mm(*tensors, ends.long()), grouped_mm(*tensors, ends))


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_is_trained_gets_a_gradient(trained: int):
    tensors, ends = make("odd", torch.float32, bias=True)
    frozen = [t.detach().requires_grad_(i == trained) for i, t in enumerate(tensors)]
    x, weight, bias = frozen
    grouped_mm(x, weight, ends, bias).sum().backward()
    assert [t.grad is not None for t in frozen] == [i == trained for i in range(3)]


def test_gradcheck():
    tensors, ends = make("idle", torch.float64, bias=True)
    small = [tensors[0].detach()[:, :3], tensors[1].detach()[:, :2, :3], tensors[2].detach()[:, :2]]
    small = [t.clone().requires_grad_() for t in small]
    assert torch.autograd.gradcheck(lambda x, w, b: grouped_mm(x, w, ends, b), small)


@pytest.mark.parametrize("name", ["odd", "none"])
def test_opcheck(name: str):
    tensors, ends = make(name, torch.float32, bias=True)
    x, weight, bias = tensors
    opcheck(grouped_mm_op, (x, weight, ends, bias))
    opcheck(grouped_mm_op, (x, weight, ends, None))
    plain = [t.detach() for t in tensors]
    gradient = torch.randn(x.shape[0], weight.shape[1])
    backward = (gradient, *plain[:2], ends, plain[2])
    opcheck(grouped_mm_backward_op, (*backward, [True, True, True]))
    opcheck(grouped_mm_backward_op, (*backward, [True, False, False]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(backend: str, dtype: torch.dtype):
    tensors, ends = make("odd", dtype, transposed=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_mm(x, weight.transpose(1, 2), ends) * 2

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    seen, expected = compiled(*tensors), run(*tensors)
    assert torch.equal(seen, expected)
    new = torch.autograd.grad(seen.sum(), tensors)
    old = torch.autograd.grad(expected.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


def test_autocast_casts():
    tensors, ends = make("odd", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = grouped_mm(*tensors, ends)
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen, grouped_mm(*(t.bfloat16() for t in tensors), ends))


class TestRefusals:
    BAD = {
        "x .* and weight .* do not fit": {"x": torch.randn(6, 5)},
        "expert_offsets .* must be": {"expert_offsets": torch.tensor([6])},
        "bias .* must be": {"bias": torch.randn(3)},
        "dtypes differ .*float64": {"x": torch.randn(6, 4).double()},
    }

    @pytest.mark.parametrize("message", BAD)
    def test_says_what_and_what_is_allowed(self, message: str):
        given = {
            "x": torch.randn(6, 4),
            "weight": torch.randn(2, 3, 4),
            "expert_offsets": torch.tensor([2, 6]),
        }
        with pytest.raises(ValueError, match=f"grouped_mm: {message}"):
            grouped_mm(**(given | self.BAD[message]))
