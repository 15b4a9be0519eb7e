"""The first pass of a model: its cache beside the caller's, what it runs, and when it cannot."""

import copy

import pytest
import torch
from integration.adapters.lora_folders import make_base, save_lora
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import moeroute
from moeroute.methods import MoLoRA, XLoRA
from moeroute.routers.first_pass import FirstPassHead

IDS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


class Foreign:
    """No cache of transformers'."""


def wake(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def mixed(tmp_path, make=make_base, targets=("q_proj", "v_proj"), **fields):
    """Two adapters of a model, their head awake."""
    settings = {"target_modules": list(targets), "fan_in_fan_out": make is gpt2, "task_type": None}
    folders = {
        name: save_lora(tmp_path / name, seed=seed, base=make(), **settings)
        for seed, name in enumerate(["math", "code"])
    }
    model = moeroute.mix_adapters(make(), folders, router=XLoRA(**fields))
    return wake(model).eval()


def mistral():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2))


def qwen3_next():
    torch.manual_seed(0)
    heads = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "head_dim": 8}
    widths = {"linear_key_head_dim": 4, "linear_value_head_dim": 4, "moe_intermediate_size": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8}
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    return Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **heads, **widths, **experts, **layers))


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (make_base, ("q_proj", "down_proj")),
        (mistral, ("v_proj",)),
        (gpt2, ("c_fc",)),
        (qwen3_next, ("out_proj", "q_proj")),
    ],
)
@torch.no_grad()
def test_a_cache_changes_no_logit(tmp_path, make, targets):
    model = mixed(tmp_path, make, targets)
    whole = model(input_ids=IDS).logits
    assert (whole - make().eval()(input_ids=IDS).logits).abs().max() > 0.01
    cache, parts = None, []
    for ids in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:]):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "ways",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_generates_alike_with_and_without_a_cache(tmp_path, ways):
    model = mixed(tmp_path)
    ids = IDS[:1] if "prompt_lookup_num_tokens" in ways else IDS  # of one sample only
    beams = {key: value for key, value in ways.items() if "num" in key and "prompt" not in key}
    written = model.generate(input_ids=ids, **ways, **SETTINGS)
    again = model.generate(input_ids=ids, use_cache=False, **beams, **SETTINGS)
    assert torch.equal(written, again)


@torch.no_grad()
def test_copies_crops_orders_and_resets_of_a_cache_hold_for_both_passes(tmp_path):
    model = mixed(tmp_path)
    whole = model(input_ids=IDS).logits
    prompt = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    for _ in range(2):
        cache = copy.deepcopy(prompt)
        rest = model(input_ids=IDS[:, 4:], past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[:, 4:])
    cache.crop(-3)
    rest = model(input_ids=IDS[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:])
    cache, order = copy.deepcopy(prompt), torch.tensor([1, 0])
    cache.reorder_cache(order)  # as beams do
    rest = model(input_ids=IDS[order, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[order, 4:])
    static = StaticCache(config=make_base().config, max_cache_len=9)
    model(input_ids=IDS.flip(1), past_key_values=static)
    static.reset()
    torch.testing.assert_close(model(input_ids=IDS, past_key_values=static).logits, whole)


@torch.no_grad()
def test_a_cache_that_no_first_pass_saw(tmp_path):
    model = mixed(tmp_path)
    foreign = make_base()(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="tokens that no first pass saw"):
        model(input_ids=IDS[:, 4:], past_key_values=foreign)
    cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with model.disable_adapter():
        model(input_ids=IDS[:, 4:5], past_key_values=cache)
    with pytest.raises(ValueError, match="some were added with this adapter off"):
        model(input_ids=IDS[:, 5:], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot keep its states in a Foreign"):
        model(input_ids=IDS, past_key_values=Foreign())


@pytest.mark.parametrize(("per_sample", "passes"), [(False, 2), (True, 1)])
def test_generated_tokens_are_read_once_a_pass(tmp_path, per_sample, passes):
    model, seen = mixed(tmp_path, per_sample=per_sample), []
    model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    model.generate(input_ids=IDS, **SETTINGS)
    assert seen == [IDS.shape[1]] * 2 + [1] * passes * (SETTINGS["max_new_tokens"] - 1)


def test_one_row_a_sample_lasts_as_long_as_its_cache(tmp_path):
    model = mixed(tmp_path, per_sample=True)
    cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled with 2 samples but this call has 1"):
        model(input_ids=IDS[:1, 4:], past_key_values=cache)
    with pytest.raises(ValueError, match="tokens that no first pass saw"):
        model(input_ids=IDS[:, 4:], past_key_values=copy.copy(cache))


def test_the_first_pass_leaves_the_output_embedding_out(tmp_path):
    model, seen = mixed(tmp_path), []
    model.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))
    model(input_ids=IDS, labels=IDS)
    assert len(seen) == 1


def test_every_way_to_call_the_model(tmp_path):
    model = mixed(tmp_path)
    expected = model(input_ids=IDS).logits
    root = model.get_base_model()
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(root(IDS).logits, expected)
    assert torch.equal(model(inputs_embeds=embedded).logits, expected)
    assert torch.equal(model(input_ids=IDS, return_dict=False)[0], expected)
    states = model(input_ids=IDS, output_hidden_states=True, logits_to_keep=1)
    torch.testing.assert_close(states.logits, expected[:, -1:])
    assert len(states.hidden_states) == 3


def test_only_the_second_pass_is_recorded(tmp_path):
    model, kept = mixed(tmp_path, first_pass_weight=0.5), []
    host = model.get_base_model().model.layers[0].self_attn.q_proj
    with host.routing_pass.listening(kept.append):
        model(input_ids=IDS)
    assert len({record.site for record in kept}) == len(kept) == 4
    assert all(record.routing.routing_weights.max() > 0.5 for record in kept)


def test_an_error_in_the_first_pass_leaves_the_model_as_it_was(tmp_path):
    model = mixed(tmp_path)
    expected = model(input_ids=IDS).logits
    with pytest.raises(IndexError):
        model(input_ids=IDS + 31)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_the_active_adapter_alone_decides_whether_there_are_two_passes(tmp_path):
    model, seen = mixed(tmp_path), []
    model.get_base_model().model.register_forward_hook(lambda *_: seen.append(1))

    def passes():
        seen.clear()
        model(input_ids=IDS)
        return len(seen)

    assert passes() == 2
    moeroute.wrap_model(model, MoLoRA(r=2), adapter_name="other", target_modules=["q_proj"])
    model.set_adapter("other")
    assert passes() == 1
    model.set_adapter("default")
    assert passes() == 2
    with model.disable_adapter():
        assert passes() == 1
    model.set_adapter("other")
    model.delete_adapter("default")
    assert passes() == 1
    assert not any(isinstance(module, FirstPassHead) for module in model.modules())


def test_a_part_called_without_the_whole(tmp_path):
    model = mixed(tmp_path)
    model(input_ids=IDS)
    with pytest.raises(ValueError, match="call that and no part of it"):
        model.get_base_model().model(IDS)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused(tmp_path):
    model = mixed(tmp_path).train()
    enable = getattr(model, "activation_checkpointing_enable", None)  # by its newer name
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match='"use_reentrant": False'):
        model(input_ids=IDS, labels=IDS)


def test_models_of_other_heads_and_of_none(tmp_path):
    def classifier():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(make_base(pad_token_id=0).config)

    model = mixed(tmp_path / "classifier", classifier)
    labels = torch.tensor([0, 1])
    output = model(input_ids=IDS, labels=labels)
    assert output.loss.requires_grad
    assert not torch.equal(output.logits, classifier()(input_ids=IDS).logits)

    def backbone():
        return make_base().model

    model = mixed(tmp_path / "backbone", backbone)
    assert model(input_ids=IDS).last_hidden_state.shape == (2, 7, 16)


def test_encoder_decoders_are_refused_before_they_are_touched(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=31, **sizes))
    lora = save_lora(
        tmp_path / "math", base=copy.deepcopy(base), target_modules=["q"], task_type=None
    )
    with pytest.raises(ValueError, match="no encoder-decoder"):
        moeroute.mix_adapters(base, {"math": lora}, router=XLoRA())
    assert not base._forward_pre_hooks
    assert all(isinstance(m, nn.Linear) for name, m in base.named_modules() if name.endswith(".q"))


def test_unwrapping_takes_the_hooks_along(tmp_path):
    base = moeroute.unwrap_model(mixed(tmp_path))
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    assert isinstance(base.model.layers[0].self_attn.q_proj, nn.Linear)
