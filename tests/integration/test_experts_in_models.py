"""`experts_implementation="moeroute"` in whole models: load, switch, generate, train, compile."""

import pytest
import torch
from integration import tiny_models
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.hf


def test_loads_saves_and_switches(tmp_path):
    model = tiny_models.build("mixtral")
    ids = tiny_models.token_ids()
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moeroute"
    ).eval()
    assert loaded.get_experts_implementation() == {"": "moeroute"}
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    loaded.set_experts_implementation("eager")
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    loaded.set_experts_implementation({"": "moeroute"})
    assert loaded.get_experts_implementation() == {"": "moeroute"}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same_tokens(family, cache):
    model = tiny_models.build(family)
    settings = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    ids = tiny_models.token_ids()
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **settings)
    model.set_experts_implementation("moeroute")
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)


def test_router_logits_and_auxiliary_loss():
    model = tiny_models.build("mixtral")
    ids = tiny_models.token_ids()
    expected = model(input_ids=ids, labels=ids, output_router_logits=True)
    model.set_experts_implementation("moeroute")
    found = model(input_ids=ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(found.router_logits, expected.router_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_part_of_the_model_alone():
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeModel

    text = {key: tiny_models.SMALL[key] for key in ("vocab_size", "hidden_size", "head_dim")}
    text |= {"num_hidden_layers": 1, "num_experts": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "moe_intermediate_size": 24, "intermediate_size": 48}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": []}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    config._experts_implementation = {"text_config": "moeroute", "": "eager"}
    model = Qwen3VLMoeModel(config)
    asked = model.get_experts_implementation()
    assert asked[""] == "eager"
    assert asked["text_config"] == "moeroute"
    experts = next(tiny_models.experts_of(model))
    assert experts.config._experts_implementation == "moeroute"


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_models.build("mixtral", implementation="moeroute").train()
    ids = tiny_models.token_ids()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    newer = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.23
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_bfloat16_model():
    model = tiny_models.build("mixtral").bfloat16()
    ids = tiny_models.token_ids()
    expected = model(input_ids=ids).logits
    model.set_experts_implementation("moeroute")
    found = model(input_ids=ids).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "muse_spark"])
def test_whole_model_compiles_fullgraph(family):
    model = tiny_models.build(family, implementation="moeroute")
    ids = tiny_models.token_ids()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False)[0]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(input_ids=ids, use_cache=False)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
