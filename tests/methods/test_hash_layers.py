"""Hash layers' own properties; all else is in the contract suite."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.methods import HashLayers


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def records(model, **inputs):
    kept = []
    host = next(m for m in model.modules() if isinstance(m, MoELayer)).routing_pass
    with host.listening(kept.append):
        model(**inputs)
    return [record.routing.selected_experts[:, 0] for record in kept]


def test_an_id_has_its_experts_in_training_and_eval_and_each_layer_its_own(llama):
    model = moeroute.wrap_model(llama, HashLayers(num_experts=4, intermediate_size=3))
    ids = torch.arange(30).reshape(2, 15)
    train, plain = records(model.train(), input_ids=ids), records(model.eval(), input_ids=ids)
    for one, other in zip(train, plain, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(train[0], train[1])
    again = records(model, input_ids=ids.flip(1))
    assert torch.equal(again[0].reshape(2, 15).flip(1).flatten(), train[0])


def test_embeddings_alone_are_an_error(llama):
    model = moeroute.wrap_model(llama, HashLayers(num_experts=4, intermediate_size=3))
    with pytest.raises(ValueError, match="not inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 3, 16))


def test_a_new_model_hears_of_the_ids_when_it_is_connected(llama):
    method = HashLayers(num_experts=4, top_k=2, table_size=31)
    for block in llama.model.layers:
        experts = SwiGLUExperts(4, 16, 8)
        block.mlp = MoELayer(router=method.router(16, 4), experts=experts, losses=method.losses())
    ids = torch.arange(6)[None]
    with pytest.raises(ValueError, match="connect_layers"):
        llama(input_ids=ids)
    model = moeroute.connect_layers(llama)
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("fields", [{"top_k": 9}, {"table_size": 0}, {"num_experts": 0}])
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError, match=f"HashLayers: {next(iter(fields))}="):
        HashLayers(**fields)
