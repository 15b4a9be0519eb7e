"""ReMoE's own properties; all else is in the contract suite."""

import pytest
import torch

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.methods import ReLURouting


def make(**fields):
    torch.manual_seed(0)
    method = ReLURouting(**fields)
    return MoELayer(
        router=method.router(6, 8), experts=SwiGLUExperts(8, 6, 5), losses=method.losses()
    )


def active_share(layer, x):
    with moeroute.track_routing(layer), torch.no_grad():
        layer(x)
    routing = next(iter(layer.routing_pass.records.values())).routing
    return (routing.selected_experts < 8).float().mean()


def test_about_half_are_active_at_first_and_the_loss_makes_it_sparse():
    layer = make(top_k=2, sparsity_loss_coef=1e-3)
    assert 0.4 < active_share(layer, torch.randn(200, 6)) < 0.6
    x = torch.randn(200, 6) + 0.7  # without a mean half of them stay active, whatever the rows
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        layer(x)
        moeroute.aux_losses(layer).total.backward()
        optimizer.step()
        moeroute.post_step(layer)
    assert active_share(layer, x) < 0.35  # the target is 2 of 8


def test_a_recomputed_forward_counts_once():
    layer, x = make(top_k=2), torch.randn(20, 6, requires_grad=True)
    layer(x)
    once = layer.router.select._seen.clone()
    layer.router.select._seen = None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(layer.router.select._seen, once)


def test_on_a_gate_the_checkpoints_rows_choose():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )
    rows = base.model.layers[0].mlp.gate.weight.detach().clone()
    model = moeroute.wrap_model(base, ReLURouting())
    (router,) = moeroute.routers(model).values()
    assert torch.equal(router.score.weight, rows)
    assert router.select.slots == 2


@pytest.mark.parametrize(
    "fields", [{"top_k": 0}, {"sparsity_loss_coef": 0.0}, {"sparsity_step": 1.0}]
)
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError, match=f"ReLURouting: .*{next(iter(fields))}"):
        ReLURouting(**fields)
