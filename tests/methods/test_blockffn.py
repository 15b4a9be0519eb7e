"""BlockFFN's own properties; all else is in the contract suite."""

import pytest
import torch

import moeroute
from moeroute.layers import MLPExperts, MoELayer
from moeroute.methods import BlockFFN
from moeroute.types import RouterInput


def make(experts=6, hidden=5, width=4):
    torch.manual_seed(0)
    return MoELayer(
        router=BlockFFN().router(hidden, experts),
        experts=MLPExperts(experts, hidden, width, activation="silu"),
        losses=BlockFFN().losses(),
    )


def test_a_layer_is_the_papers_sum():
    layer, x = make(), torch.randn(3, 4, 5)
    active = torch.relu(x @ layer.router.score.weight.T)
    weights = active * torch.rsqrt(active.square().mean(-1, keepdim=True) + 1e-6)
    up, down = layer.experts.up_proj, layer.experts.down_proj
    hidden = torch.nn.functional.silu(torch.einsum("bsh,eih->bsei", x, up))
    expected = torch.einsum("bse,bsei,ehi->bsh", weights, hidden, down)
    torch.testing.assert_close(layer(x), expected)


def test_the_size_of_a_token_sets_no_weight():
    layer, x = make(), torch.randn(9, 5)
    shape = {"sequence_shape": (1, 9)}
    small = layer.router(RouterInput(hidden_states=x, **shape))
    large = layer.router(RouterInput(hidden_states=50 * x, **shape))
    assert torch.equal(small.selected_experts, large.selected_experts)
    torch.testing.assert_close(small.routing_weights, large.routing_weights, rtol=1e-3, atol=1e-3)


def test_a_token_without_experts_passes_with_zero_and_without_a_gradient():
    layer = make()
    with torch.no_grad():
        layer.router.score.weight.fill_(1.0)
    x = -torch.rand(4, 5)
    y = layer(x)
    assert (y == 0).all()
    y.sum().backward()
    assert (layer.router.score.weight.grad == 0).all()


@pytest.mark.parametrize("fields", [{"num_experts": 0}, {"intermediate_size": 0}, {"eps": 0.0}])
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError, match=f"BlockFFN: {next(iter(fields))}=0"):
        moeroute.get_method("blockffn")(**fields)
