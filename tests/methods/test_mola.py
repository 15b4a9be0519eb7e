"""MoLA against its equation, layer by layer, and its schedules of experts."""

import json

import pytest
import torch
from methods.beside import (
    WIDTH,
    assert_same_with_gradients,
    awake,
    loop_over_experts,
    record_of,
    site_at,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.methods import MoLA
from moeroute.methods.registry import build_method, method_fields

FIELDS = {"r": 2, "lora_alpha": 3.0}


def build(layer_index=0, num_layers=8, **fields):
    base, site = site_at(layer_index, num_layers)
    return base, awake(MoLA(**{**FIELDS, **fields}).build(site, None))


def experts(schedule, num_layers):
    return [
        build(i, num_layers, num_experts=schedule)[1].bank.num_experts for i in range(num_layers)
    ]


def make_llama(num_layers):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


@pytest.mark.parametrize("layer_index", [0, 7])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_output_and_gradients_equal_the_equation(layer_index, top_k):
    base, mixture = build(layer_index, top_k=top_k)

    def weights_of(token):
        probs = torch.softmax(mixture.router.score.weight @ token, dim=0)
        kept = probs.sort(descending=True).indices[:top_k]
        return torch.zeros_like(probs).index_put((kept,), probs[kept] / probs[kept].sum())

    x = torch.randn(6, WIDTH, dtype=torch.double, requires_grad=True)
    inputs = [x, *mixture.parameters()]
    reference = loop_over_experts(base, mixture, x, weights_of)
    assert_same_with_gradients(mixture(x, base), reference, inputs)


def test_schedules():
    assert experts("2468", 8) == [2, 2, 4, 4, 6, 6, 8, 8]
    assert experts("8642", 4) == [8, 6, 4, 2]
    assert experts("2468", 6) == [2, 2, 4, 6, 6, 8]
    assert experts("2468", 1) == [2]
    assert experts((3, 1, 2), 3) == [3, 1, 2]
    assert experts([3, 1, 2], 3) == [3, 1, 2]
    assert experts(5, 3) == [5, 5, 5]


def test_slots_never_exceed_the_experts_of_a_layer():
    x = torch.randn(4, WIDTH, dtype=torch.double)
    for layer_index, slots in enumerate((2, 3, 3, 3)):
        base, mixture = build(layer_index, 4, top_k=3)
        routing = record_of(mixture, base, x).routing
        assert routing.selected_experts.shape == (4, slots)
        torch.testing.assert_close(
            routing.routing_weights.sum(1), torch.ones(4, dtype=torch.double)
        )


def test_one_expert_is_plain_lora_without_a_router():
    base, mixture = build(1, 2, num_experts=(4, 1), router_aux_loss_coef=0.1)
    assert not list(mixture.router.parameters())
    assert mixture.losses == ()
    x = torch.randn(3, 2, WIDTH, dtype=torch.double, requires_grad=True)
    bank = mixture.bank
    plain = base(x) + bank.scaling * x @ bank.lora_a.T @ bank.lora_b.T
    assert_same_with_gradients(mixture(x, base), plain, [x, *mixture.parameters()])


def test_schedules_of_equal_sum_have_equally_many_lora_parameters():
    def sizes(schedule):
        parameters = moeroute.wrap_model(
            make_llama(4), MoLA(r=2, num_experts=schedule), target_modules=["q_proj"]
        ).named_parameters()
        return {key: p.numel() for key, p in parameters if "lora_" in key}

    two, eight, flat = sizes("2468"), sizes("8642"), sizes("5555")
    assert sum(two.values()) == sum(eight.values()) == sum(flat.values())
    assert two != eight


def test_only_linears_with_a_router_are_charged():
    method = MoLA(r=2, num_experts=(1, 4), router_aux_loss_coef=0.01)
    model = moeroute.wrap_model(make_llama(2), method, target_modules=["q_proj"]).train()
    model(input_ids=torch.arange(10).reshape(2, 5))
    report = moeroute.aux_losses(model)
    assert list(report.parts) == ["BalanceLoss"]
    assert report.parts["BalanceLoss"] > 0.5
    assert report.total.requires_grad


@pytest.mark.parametrize("schedule", [4, (1, 3), "2468"])
def test_a_schedule_survives_json_and_peft(schedule, tmp_path):
    from peft import PeftModel

    method = MoLA(r=2, num_experts=schedule)
    assert build_method("mola", json.loads(json.dumps(method_fields(method)))) == method
    model = moeroute.wrap_model(make_llama(2), method, target_modules=["q_proj"]).eval()
    for key, parameter in model.named_parameters():
        if "moeroute_site" in key:
            nn.init.normal_(parameter)
    ids = torch.arange(10).reshape(2, 5)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(2), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, expected)


@pytest.mark.parametrize("schedule", ["2468", (2, 4)])
def test_a_linear_outside_the_layers_needs_one_number(schedule):
    _, site = site_at(-1, 2)
    with pytest.raises(ValueError, match="q_proj lies in none"):
        MoLA(num_experts=schedule).build(site, None)
    assert MoLA(num_experts=2).build(site, None).bank.num_experts == 2


def test_a_schedule_of_another_depth():
    _, site = site_at(0, 3)
    with pytest.raises(ValueError, match="has 2 numbers for a host of 3 layers"):
        MoLA(num_experts=(2, 4)).build(site, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 leaves a layer without experts"),
        ({"num_experts": ()}, "leaves a layer without experts"),
        ({"num_experts": (2, 0)}, "leaves a layer without experts"),
        ({"num_experts": "2460"}, "leaves a layer without experts"),
        ({"num_experts": "246"}, "is no schedule"),
        ({"num_experts": "2a68"}, "is no schedule"),
        ({"top_k": 0}, "top_k=0 is below 1"),
        ({"router_aux_loss_coef": -1.0}, "would reward imbalance"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 is outside"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        MoLA(**fields)
