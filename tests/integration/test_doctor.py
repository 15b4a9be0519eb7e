"""Each finding is provoked, and healthy models have none."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import moeroute
from moeroute.integration.doctor import doctor
from moeroute.methods import MixLoRA

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def wrapped():
    return moeroute.wrap_model(LlamaForCausalLM(LlamaConfig(**SIZES)), MixLoRA(r=2))


def problems(model):
    return [finding.problem for finding in doctor(model)]


@pytest.mark.parametrize(
    "make",
    [
        wrapped,
        lambda: mixtral().eval(),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        lambda: moeroute.MoELayer.build(hidden_size=8, intermediate_size=8, num_experts=4, top_k=2),
    ],
)
def test_healthy_models(make):
    assert doctor(make()) == []


def test_a_family_that_ignores_the_implementation():
    config = SwitchTransformersConfig(
        vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, num_experts=2
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    assert problems(model) == []
    model.config._experts_implementation = "moeroute"
    findings = doctor(model)
    assert findings
    assert all("has no effect" in finding.problem for finding in findings)
    assert findings[0].module in dict(model.named_modules())


def test_fp8_experts():
    model = mixtral().eval()
    model.config._experts_implementation = "moeroute"
    experts = model.model.layers[1].mlp.experts
    experts.__class__ = type("FP8Experts", (type(experts),), {})
    (finding,) = doctor(model)
    assert finding.severity == "error"
    assert finding.module == "model.layers.1.mlp.experts"


def test_reentrant_checkpointing():
    model = wrapped().train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": True})
    (finding,) = doctor(model)
    assert finding.severity == "error"
    assert "use_reentrant" in finding.mend


def test_a_balance_loss_that_is_not_used():
    model = mixtral().train()
    (problem,) = problems(model)
    assert "would train without a balance loss" in problem
    model.config.output_router_logits = True
    assert problems(model) == []


def test_an_adapter_that_does_not_train():
    model = wrapped().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    (problem,) = problems(model)
    assert "none of its 14 parameter tensors is trainable" in problem
    assert problems(model.eval()) == []


def test_a_target_that_no_module_is_called():
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "w_proj"]))
    (problem,) = problems(model)
    assert "nothing stands: w_proj" in problem


def test_experts_that_lora_leaves_frozen():
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, head_dim=8)).eval()
    model = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
    (problem,) = problems(model)
    assert "2 stacks of experts" in problem
    assert "untouched" in problem


def test_experts_that_peft_rebuilds():
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(target_modules=[], target_parameters=targets)
    model = get_peft_model(mixtral(), config).eval()
    (problem,) = problems(model)
    assert "4 stacks of experts with LoRA: PEFT rebuilds" in problem
    moeroute.fast_expert_lora(model)
    assert problems(model) == []


def test_experts_that_quantisation_leaves_whole():
    model = mixtral().eval()
    kind = type("Linear4bit", (nn.Linear,), {})
    model.model.layers[0].self_attn.q_proj.__class__ = kind
    (problem,) = problems(model)
    assert "2 stacks of experts stayed in full precision" in problem


def test_routers_in_half_precision():
    model = wrapped().train().to(torch.bfloat16)
    (problem,) = problems(model)
    assert "2 routers would train in half precision" in problem
    assert problems(model.eval()) == []


def test_a_finding_says_where_what_and_how_to_mend_it():
    (finding,) = doctor(mixtral().train())
    problem, mend = str(finding).splitlines()
    assert problem.startswith("info: model.layers.0.mlp.gate: 2 routers")
    assert "output_router_logits = True" in mend
