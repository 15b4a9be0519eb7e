"""The definitions themselves, against one-hot arithmetic without any routing."""

import torch
from tolerances import assert_close
from torch.nn import functional as F

from moeroute_kernels import reference
from moeroute_kernels.activations import activate


def one_hot(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """(T, K) ids -> (T, K, E), all zero for an empty slot."""
    empty = (ids < 0) | (ids >= experts)
    return F.one_hot(ids.masked_fill(empty, experts), experts + 1)[..., :-1].double()


def test_routed_mlp():
    tokens, experts, hidden, width = 9, 4, 5, 3
    x = torch.randn(tokens, hidden).double()
    gate_up = torch.randn(experts, 2 * width, hidden).double()
    down = torch.randn(experts, hidden, width).double()
    biases = torch.randn(experts, 2 * width).double(), torch.randn(experts, hidden).double()
    ids, weights = torch.randint(-1, experts + 1, (tokens, 2)), torch.rand(tokens, 2).double()
    share = torch.einsum("tke,tk->te", one_hot(ids, experts), weights)
    pre = torch.einsum("eih,th->tei", gate_up, x) + biases[0]
    rows = activate(pre[..., :width], pre[..., width:], "silu_glu")
    everything = torch.einsum("ehi,tei->teh", down, rows) + biases[1]
    seen = reference.routed_mlp(
        x, gate_up, down, ids, weights, gate_up_bias=biases[0], down_bias=biases[1]
    )
    assert_close("routed_mlp", seen, torch.einsum("te,teh->th", share, everything))


def test_sort_product_and_combine_are_the_routed_product():
    tokens, slots, experts = 9, 3, 4
    ids, weights = torch.randint(-1, experts + 1, (tokens, slots)), torch.rand(tokens, slots)
    weights, x = weights.double(), torch.randn(tokens, 5).double()
    matrices, bias = torch.randn(experts, 6, 5).double(), torch.randn(experts, 6).double()
    order, inverse, ends = reference.expert_sort(ids, experts)
    rows = reference.grouped_mm(x[order // slots], matrices, ends, bias)
    share = torch.einsum("tke,tk->te", one_hot(ids, experts), weights)
    expected = torch.einsum("te,teo->to", share, torch.einsum("eoi,ti->teo", matrices, x) + bias)
    assert_close("routed_mlp", reference.combine(rows, weights, inverse, ends), expected)


def test_half_precision_is_rounded_once():
    x, weight = torch.randn(6, 32).bfloat16(), torch.randn(2, 8, 32).bfloat16()
    ends = torch.tensor([2, 6])
    seen = reference.grouped_mm(x, weight, ends)
    assert torch.equal(seen, reference.grouped_mm(x.float(), weight.float(), ends).bfloat16())
