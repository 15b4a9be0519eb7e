"""`combine` equals its definition, and is an op."""

import pytest
import routed_cases
import torch
from tolerances import assert_close
from torch import Tensor
from torch.library import opcheck

from moeroute_kernels import combine, expert_sort, reference
from moeroute_kernels.combine import combine_backward_op, combine_op

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(20, 3, 6, 32), (7, 2, 5, 47), (1, 4, 4, 16), (0, 2, 3, 8), (9, 1, 2, 1)]


def make(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    routing: routed_cases.Routing = routed_cases.distinct,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, slots, experts, width = shape
    sorted_slots = expert_sort(routing(tokens, slots, experts), experts)
    rows = torch.randn(tokens * slots, width).to(dtype).requires_grad_()
    weights = torch.rand(tokens, slots).to(torch.promote_types(dtype, torch.float32))
    return rows, weights.requires_grad_(), sorted_slots.inverse, sorted_slots.expert_offsets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "routing", [routed_cases.distinct, routed_cases.with_empty_slots, routed_cases.nowhere]
)
def test_equals_the_definition(
    shape: tuple[int, int, int, int], dtype: torch.dtype, routing: routed_cases.Routing
):
    rows, weights, inverse, ends = make(shape, dtype, routing)
    exact = [t.detach().double().requires_grad_() for t in (rows, weights)]
    seen = combine(rows, weights, inverse, ends)
    expected = reference.combine(*exact, inverse, ends)
    assert seen.dtype == dtype
    assert_close("combine", seen, expected)
    gradient = torch.randn(seen.shape).to(dtype)
    new = torch.autograd.grad(seen, (rows, weights), gradient)
    old = torch.autograd.grad(expected, exact, gradient.double())
    assert_close("combine", new[0], old[0], "rows")
    assert_close("combine", new[1], old[1], "weights", dtype)


def test_by_hand():
    rows = torch.tensor([[1.0], [10.0], [100.0], [float("nan")]])
    weights = torch.tensor([[0.5, 2.0], [3.0, float("nan")]])
    inverse, ends = torch.tensor([1, 0, 2, 3]), torch.tensor([2, 3], dtype=torch.int32)
    assert combine(rows, weights, inverse, ends).tolist() == [[7.0], [300.0]]


def test_empty_slots_are_never_read():
    rows, weights, inverse, ends = make((20, 3, 6, 32), routing=routed_cases.with_empty_slots)
    filled = int(ends[-1])
    clean = combine(rows, weights, inverse, ends)
    with torch.no_grad():
        rows[filled:] = float("nan")
        weights[(inverse >= filled).view(weights.shape)] = float("nan")
    gradient = torch.ones_like(clean)
    gradient[0] = float("nan")  # of a token whose slots are all empty
    seen = combine(rows, weights, inverse, ends)
    found = torch.autograd.grad(seen, (rows, weights), gradient)
    assert torch.equal(seen, clean)
    assert not found[0][filled:].any()
    assert all(torch.isfinite(t).all() for t in found)


def test_sums_in_float32():
    tokens, slots = 3, 64
    rows = torch.full((tokens * slots, 4), 1.0, dtype=torch.bfloat16)
    weights = torch.full((tokens, slots), 1.0 + 2.0**-12)
    inverse = torch.arange(tokens * slots)
    out = combine(rows, weights, inverse, torch.tensor([tokens * slots]))
    assert out.tolist() == [[64.0] * 4] * tokens
    wide = combine(rows.float(), weights, inverse, torch.tensor([tokens * slots]))
    assert wide.tolist() == [[64.0 + 2.0**-6] * 4] * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_repeats_are_bitwise_equal(dtype: torch.dtype):
    rows, weights, inverse, ends = make((50, 4, 6, 33), dtype)

    def run() -> list[Tensor]:
        out = combine(rows, weights, inverse, ends)
        return [out, *torch.autograd.grad(out.float().square().sum(), (rows, weights))]

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_strided_inputs_and_expanded_gradients():
    rows, weights, inverse, ends = make((20, 3, 6, 32), torch.float64)
    expected = torch.autograd.grad(combine(rows, weights, inverse, ends).sum(), (rows, weights))
    spread = [torch.stack([t, t], -1).detach()[..., 0].requires_grad_() for t in (rows, weights)]
    seen = torch.autograd.grad(combine(*spread, inverse, ends).sum(), spread)
    for a, b in zip(seen, expected, strict=True):
        assert_close("combine", a, b)


@pytest.mark.parametrize("trained", [0, 1])
def test_only_what_is_trained_gets_a_gradient(trained: int):
    rows, weights, inverse, ends = make((20, 3, 6, 32))
    frozen = [t.detach().requires_grad_(i == trained) for i, t in enumerate((rows, weights))]
    combine(*frozen, inverse, ends).sum().backward()
    assert [t.grad is not None for t in frozen] == [i == trained for i in range(2)]


def test_gradcheck():
    rows, weights, inverse, ends = make((5, 2, 3, 2), torch.float64, routed_cases.with_empty_slots)
    assert torch.autograd.gradcheck(lambda r, w: combine(r, w, inverse, ends), (rows, weights))


@pytest.mark.parametrize("shape", [(20, 3, 6, 32), (0, 2, 3, 8)], ids=str)
def test_opcheck(shape: tuple[int, int, int, int]):
    rows, weights, inverse, ends = make(shape)
    opcheck(combine_op, (rows, weights, inverse, ends))
    plain = (torch.randn(shape[0], shape[3]), rows.detach(), weights.detach(), inverse, ends)
    opcheck(combine_backward_op, (*plain, [True, True]))
    opcheck(combine_backward_op, (*plain, [False, True]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str):
    rows, weights, inverse, ends = make((20, 3, 6, 32))
    compiled = torch.compile(combine, fullgraph=True, backend=backend)
    seen, expected = (f(rows, weights, inverse, ends) for f in (compiled, combine))
    assert torch.equal(seen, expected)
    new = torch.autograd.grad(seen.sum(), (rows, weights))
    old = torch.autograd.grad(expected.sum(), (rows, weights))
    assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


def test_refuses_what_does_not_fit():
    rows, weights, inverse, ends = make((20, 3, 6, 32))
    with pytest.raises(ValueError, match=r"combine: rows .* and routing_weights .* do not fit"):
        combine(rows[1:], weights, inverse, ends)
    with pytest.raises(ValueError, match=r"combine: inverse .* must be \(60,\)"):
        combine(rows, weights, inverse[1:], ends)
