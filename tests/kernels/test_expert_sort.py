"""`expert_sort`: order, inverse and ends."""

import pytest
import routed_cases
import torch
from torch.library import opcheck

from moeroute_kernels import expert_sort, reference
from moeroute_kernels.expert_sort import expert_sort_op, invert


def test_by_hand():
    order, inverse, ends = expert_sort(torch.tensor([[2, 0], [-1, 2], [0, 3]]), 3)
    assert order.tolist() == [1, 4, 0, 3, 2, 5]
    assert inverse.tolist() == [2, 0, 4, 3, 1, 5]
    assert ends.tolist() == [2, 2, 4]
    assert order.dtype == inverse.dtype == torch.int64
    assert ends.dtype == torch.int32


ROUTINGS = [
    routed_cases.distinct,
    routed_cases.with_empty_slots,
    routed_cases.crowded,
    routed_cases.nowhere,
]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "slots", "experts"), [(50, 3, 7), (1, 1, 1), (0, 2, 4)])
def test_equals_the_definition(
    routing: routed_cases.Routing, tokens: int, slots: int, experts: int
):
    ids = routing(tokens, slots, experts)
    for seen, expected in zip(
        expert_sort(ids, experts), reference.expert_sort(ids, experts), strict=True
    ):
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_dtype_and_strides(dtype: torch.dtype):
    ids = torch.randint(0, 9, (3, 40)).to(dtype).t()
    assert not ids.is_contiguous()
    for seen, expected in zip(expert_sort(ids, 7), expert_sort(ids.long(), 7), strict=True):
        assert torch.equal(seen, expected)


def test_expanded_ids():
    ids = torch.tensor([[1, 0]]).expand(5, 2)
    assert expert_sort(ids, 2).order.tolist() == [1, 3, 5, 7, 9, 0, 2, 4, 6, 8]


def test_invert():
    order = torch.randperm(31)
    assert torch.equal(order[invert(order)], torch.arange(31))


@pytest.mark.parametrize("tokens", [0, 11])
def test_opcheck(tokens: int):
    opcheck(expert_sort_op, (torch.randint(-1, 5, (tokens, 2)), 4))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend: str):
    compiled = torch.compile(lambda ids: expert_sort(ids, 4), fullgraph=True, backend=backend)
    ids = torch.randint(-1, 5, (11, 2))
    for seen, expected in zip(compiled(ids), expert_sort(ids, 4), strict=True):
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("ids", [torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)])
def test_refuses_what_is_no_matrix_of_integers(ids: torch.Tensor):
    with pytest.raises(ValueError, match=r"expert_sort: ids .* give a \(T, K\) integer tensor"):
        expert_sort(ids, 2)


def test_refuses_no_experts():
    with pytest.raises(ValueError, match="num_groups=0; there must be at least 1"):
        expert_sort(torch.zeros(3, 2, dtype=torch.int64), 0)
