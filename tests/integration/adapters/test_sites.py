"""Which places of a host model are found, and which bases can carry a mixture."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import moeroute
from moeroute.integration.adapters.sites import find_sites
from moeroute.methods import MixLoRA, MoLoRA

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_gpt2(**dropout):
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, **dropout)
    return GPT2LMHeadModel(config)


class ForwardOnly(nn.Module):
    """A base linear of which nothing but forward can be used, as a quantised one."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().to(torch.float16))

    def forward(self, x):
        return x @ self.packed.T.to(x.dtype)


def test_sites_know_their_depth_and_widths():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    blocks = find_sites(model, "mlp")
    assert [(site.name, site.layer_index) for site in blocks] == [
        ("model.layers.0.mlp", 0),
        ("model.layers.1.mlp", 1),
    ]
    assert blocks[0].widths == {"gate": (32, 48), "up": (32, 48), "down": (48, 32)}
    assert blocks[0].num_layers == 2
    linears = {site.name.rpartition(".")[2] for site in find_sites(model, "linear")}
    assert linears == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("method", [MixLoRA(r=2), MoLoRA(r=2)])
def test_gpt2_without_dropout(method):
    base = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = torch.arange(7)[None]
    expected = base.train()(input_ids=ids).logits
    assert torch.equal(moeroute.wrap_model(base, method)(input_ids=ids).logits, expected)


def test_a_block_with_dropout_is_refused():
    with pytest.raises(ValueError, match="p=0.1"):
        moeroute.wrap_model(tiny_gpt2(), MixLoRA(r=2))


@pytest.mark.parametrize("method", [MixLoRA(r=2), MoLoRA(r=2)])
def test_a_base_of_which_only_forward_can_be_used(method):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for site in find_sites(model, "linear"):
        parent, _, child = site.name.rpartition(".")
        setattr(model.get_submodule(parent), child, ForwardOnly(site.module))
    ids = torch.arange(7)[None]
    expected = model(input_ids=ids).logits
    wrapped = moeroute.wrap_model(model, method)
    assert torch.equal(wrapped.eval()(input_ids=ids).logits, expected)
    wrapped.train()(input_ids=ids, labels=ids).loss.backward()
    grown = [p.grad for k, p in wrapped.named_parameters() if "lora_b" in k]
    assert grown
    assert all(gradient.abs().sum() > 0 for gradient in grown)


def test_experts_that_no_name_can_reach_are_named():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    with pytest.warns(UserWarning, match="2 stacks of experts get no adapter"):
        moeroute.wrap_model(model, MoLoRA(r=2))


def test_a_moe_checkpoint_has_no_dense_block():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    with pytest.raises(ValueError, match="no mlp site"):
        moeroute.wrap_model(model, MixLoRA(r=2))
