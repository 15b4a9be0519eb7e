"""One gate ahead of all layers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.routers import PreGate, PreGateRouter, TopK
from moeroute.types import RouterInput

EXPERTS, LAYERS, VOCAB = 4, 3, 31


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    gate = PreGate(VOCAB, EXPERTS, width=16, num_heads=2)
    for index, block in enumerate(made.model.layers):
        block.mlp = MoELayer(
            router=PreGateRouter(gate, TopK(2), owns_gate=index == 0),
            experts=SwiGLUExperts(EXPERTS, 16, 8),
        )
    return moeroute.connect_layers(made)


def logits_of(model, **inputs):
    kept = []
    with model.model.layers[0].mlp.routing_pass.listening(kept.append):
        output = model(**inputs)
    return output, [record.routing.router_logits for record in kept]


def test_all_layers_route_alike_and_the_gate_knows_it_beforehand(model):
    ids = torch.arange(10).reshape(2, 5)
    _, logits = logits_of(model, input_ids=ids)
    gate = model.model.layers[0].mlp.router.gate
    assert len(logits) == LAYERS
    for layer in logits:
        torch.testing.assert_close(layer, gate(ids).flatten(0, 1))
    owned = [key for key in model.state_dict() if "router.gate." in key]
    assert owned
    assert all(key.startswith("model.layers.0.") for key in owned)


def test_the_gate_sees_no_later_id_and_no_padding(model):
    gate = model.model.layers[0].mlp.router.gate
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 5:] = 30
    before, after = gate(ids), gate(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    _, logits = logits_of(model, input_ids=ids, attention_mask=mask)
    _, other = logits_of(model, input_ids=changed, attention_mask=mask)
    torch.testing.assert_close(logits[0][:5], other[0][:5])


def test_generating_with_a_cache_equals_without(model):
    model.eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.arange(8).reshape(2, 4)
    cached = model.generate(input_ids=ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **settings))


def test_every_parameter_learns_also_when_recomputed(model):
    ids, found = torch.arange(10).reshape(2, 5), []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters()})
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)
        assert gradient.abs().sum() > 0, key


def test_what_cannot_be():
    gate = PreGate(VOCAB, EXPERTS, width=16, num_heads=2)
    router = PreGateRouter(gate, TopK(2))
    tokens = torch.randn(3, 16)
    with pytest.raises(ValueError, match="not inputs_embeds"):
        router(RouterInput(hidden_states=tokens, sequence_shape=(1, 3)))
    with pytest.raises(ValueError, match="handed on logits of"):
        router(RouterInput(hidden_states=tokens, sequence_shape=(1, 3), state=torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="width=18"):
        PreGate(VOCAB, EXPERTS, width=18)
    with pytest.raises(ValueError, match="exceeds the 4 experts"):
        PreGateRouter(gate, TopK(5))
