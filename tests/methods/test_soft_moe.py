"""Soft MoE's own properties; all else is in the contract suite."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.layers import SwiGLUExperts
from moeroute.layers.soft_moe import SlotRouter, SoftMoELayer
from moeroute.methods import SoftMoE
from moeroute.types import RouterInput, RouterOutput

HIDDEN, EXPERTS, SLOTS = 6, 3, 2


def make():
    torch.manual_seed(0)
    layer = SoftMoE(slots_per_expert=SLOTS).layer(HIDDEN, 5, EXPERTS)
    with torch.no_grad():
        layer.router.scale.fill_(4.0)
    return layer


def expert(layer, e, rows):
    ones = torch.ones(rows.shape[0], 1)
    return layer.experts(
        rows,
        RouterOutput(
            router_logits=torch.zeros(rows.shape[0], EXPERTS),
            routing_weights=ones,
            selected_experts=torch.full((rows.shape[0], 1), e),
        ),
    )


def reference(layer, x):
    """One sample, (S, H), slot by slot."""
    phi = functional.normalize(layer.router.phi, dim=0)
    logits = 4.0 * torch.einsum("sh,hep->sep", functional.normalize(x, dim=1), phi)
    combine = logits.flatten(1).softmax(1).reshape(logits.shape)
    y = torch.zeros_like(x)
    for e in range(EXPERTS):
        for p in range(SLOTS):
            slot = logits[:, e, p].softmax(0) @ x
            y = y + combine[:, e, p, None] * expert(layer, e, slot[None])
    return y


def test_the_layer_is_the_papers():
    layer, x = make(), torch.randn(2, 7, HIDDEN)
    torch.testing.assert_close(layer(x), torch.stack([reference(layer, row) for row in x]))
    torch.testing.assert_close(layer(x[0]), reference(layer, x[0]))


def test_weights_sum_to_one_and_padding_has_none():
    router, x = make().router, torch.randn(2 * 7, HIDDEN)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 3:] = False
    given = RouterInput(hidden_states=x, sequence_shape=(2, 7), token_mask=mask.flatten())
    weights = router(given)
    torch.testing.assert_close(weights.dispatch.sum(1), torch.ones(2, EXPERTS, SLOTS))
    torch.testing.assert_close(weights.combine.sum((2, 3)), mask.float())
    assert (weights.dispatch[1, 3:] == 0).all()
    nothing = RouterInput(
        hidden_states=x, sequence_shape=(2, 7), token_mask=torch.zeros(14, dtype=torch.bool)
    )
    assert (router(nothing).dispatch == 0).all()


def test_padding_with_nan_moves_no_token():
    layer, x = make(), torch.randn(1, 7, HIDDEN)
    padded = torch.cat([x, torch.full((1, 3, HIDDEN), float("nan"))], 1)
    mask = (torch.arange(10) < 7)[None]
    layer.routing_pass.begin(token_mask=mask)
    y = layer(padded)
    torch.testing.assert_close(y[:, :7], reference(layer, x[0])[None])
    assert (y[:, 7:] == 0).all()
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_permuting_tokens_permutes_the_output():
    layer, x, order = make(), torch.randn(1, 7, HIDDEN), torch.randperm(7)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_a_causal_model_is_warned_about():
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = moeroute.wrap_model(LlamaForCausalLM(config), SoftMoE()).eval()
    with pytest.warns(UserWarning, match=r"mlp mixes all tokens of a sample"):
        model(input_ids=torch.arange(5)[None])


def test_what_cannot_be():
    with pytest.raises(ValueError, match="slots_per_expert=0"):
        SoftMoE(slots_per_expert=0)
    with pytest.raises(ValueError, match=r"\(6, 3\) but the experts have \(6, 4\)"):
        SoftMoELayer(router=SlotRouter(6, 3), experts=SwiGLUExperts(4, 6, 5))
