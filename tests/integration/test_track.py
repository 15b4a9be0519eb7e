"""track_routing counts what the model routes: checked against what its router is seen to answer."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moeroute
from moeroute.methods import MixLoRA

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {"num_experts_per_tok": 2}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, **MOE, num_local_experts=4))


def qwen():
    settings = MOE | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **settings))


def olmoe():
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, **MOE, num_experts=4))


def deepseek():
    settings = MOE | {
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**(SIZES | {"num_key_value_heads": 4}), **settings)
    )


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**SIZES, **MOE, num_local_experts=4, head_dim=8))


FAMILIES = [mixtral, qwen, olmoe, deepseek, gpt_oss]


def seen_choices(model, call):
    """(layer, ids) of every experts call, recorded beside track_routing."""
    seen = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def note(_, args, kwargs, name=name):
                tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
                seen.setdefault(name, []).append(tensors[1])

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    call()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("make", FAMILIES)
def test_counts_equal_what_the_experts_were_asked(make):
    torch.manual_seed(0)
    model = make().eval()
    ids = torch.randint(0, 61, (3, 7))
    with moeroute.track_routing(model) as stats:
        seen = seen_choices(model, lambda: model(input_ids=ids))
    assert [layer.name for layer in stats.layers] == list(seen)
    for layer in stats.layers:
        chosen = torch.cat(seen[layer.name])
        expected = torch.bincount(chosen.flatten().long(), minlength=4)
        assert torch.equal(layer.counts, expected)
        assert layer.tokens == 21
        assert layer.counts.sum() == 42
        pairs = torch.zeros(4, 4, dtype=torch.long)
        for row in chosen.long():
            for left in row:
                for right in row:
                    pairs[left, right] += 1
        assert torch.equal(layer.coactivation, pairs)


def test_hooks_are_gone_after_the_block():
    model = mixtral()
    with moeroute.track_routing(model):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_is_left_out_and_generate_is_followed():
    torch.manual_seed(0)
    model = mixtral().eval()
    ids = torch.randint(1, 61, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with moeroute.track_routing(model) as stats:
        model(input_ids=ids, attention_mask=mask)
    assert {layer.tokens for layer in stats.layers} == {8}
    with moeroute.track_routing(model) as stats:
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0
        )
    assert {layer.tokens for layer in stats.layers} == {8 + 2 * 2}


@pytest.mark.parametrize("make", [mixtral, "wrapped"])
def test_recomputation_is_not_counted_again(make):
    torch.manual_seed(0)
    model = mixtral() if make is mixtral else wrapped()
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if make != mixtral:
        model.enable_input_require_grads()
    ids = torch.randint(0, 61, (2, 6))
    with moeroute.track_routing(model) as stats:
        model(input_ids=ids, labels=ids).loss.backward()
    assert {layer.tokens for layer in stats.layers} == {12}


def wrapped():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    return moeroute.wrap_model(llama, MixLoRA(r=2, num_experts=4, top_k=2))


def test_a_wrapped_model_in_eval():
    model = wrapped().eval()
    ids = torch.randint(0, 61, (2, 6))
    with moeroute.track_routing(model) as stats:
        model(input_ids=ids, attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]))
        model(input_ids=ids)
    layers = stats.layers
    assert [layer.name for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [layer.layer_index for layer in layers] == [0, 1]
    assert {layer.tokens for layer in layers} == {22}


def test_layers_of_a_model_of_ones_own():
    build = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 3, "top_k": 1}
    model = nn.Sequential(moeroute.MoELayer.build(**build), moeroute.MoELayer.build(**build))
    with torch.no_grad():
        for layer in model:
            layer.router.score.weight.copy_(torch.eye(3, 8))
    with moeroute.track_routing(model) as stats:
        model[0](torch.eye(3, 8)[[0, 0, 0, 1]])
    layer = stats.layers[0]
    assert layer.name == "0"
    assert layer.counts.tolist() == [3, 1, 0]
    assert layer.load.tolist() == [0.75, 0.25, 0.0]
    assert layer.dead_experts == (2,)
    assert layer.max_violation == pytest.approx(3 / (4 / 3) - 1)
    assert layer.mean_weights.tolist() == [1.0, 1.0, 0.0]


def test_a_soft_mixture_is_even():
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = moeroute.wrap_model(llama, "molora", num_experts=4, target_modules=["q_proj"]).eval()
    with moeroute.track_routing(model) as stats:
        model(input_ids=torch.randint(0, 61, (2, 6)))
    for layer in stats.layers:
        assert layer.entropy == pytest.approx(1.0)
        assert layer.cv == pytest.approx(0.0)


def test_tables_data_and_pictures(tmp_path):
    model = mixtral().eval()
    with moeroute.track_routing(model) as stats:
        assert "nothing was routed" in str(stats)
        with pytest.raises(ValueError, match="nothing was routed"):
            stats.plot(tmp_path / "empty.png")
        model(input_ids=torch.randint(0, 61, (2, 6)))
    text = str(stats)
    assert "model.layers.1.mlp.experts" in text
    assert "entropy" in text
    data = json.loads(json.dumps(stats.to_dict()))
    assert [layer["tokens"] for layer in data["layers"]] == [12, 12]
    for suffix in ("png", "svg", "pdf"):
        stats.plot(tmp_path / f"routing.{suffix}")
        assert (tmp_path / f"routing.{suffix}").stat().st_size > 1000


def test_a_dense_model_is_refused():
    with (
        pytest.raises(ValueError, match="routes nothing"),
        moeroute.track_routing(LlamaForCausalLM(LlamaConfig(**SIZES))),
    ):
        pass
