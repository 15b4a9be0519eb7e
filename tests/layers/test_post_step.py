"""State without a gradient is shown every training forward once, and moves once a step."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.integration.adapters.site_host import SiteHost


class Counting(nn.Module):
    """Passes its router's answer on and counts what it is shown."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.num_experts = inner, inner.num_experts
        self.seen, self.steps = [], 0

    def forward(self, router_input):
        return self.inner(router_input)

    def observe(self, record):
        self.seen.append(record)

    def post_step(self):
        self.steps += 1


def counted_llama():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    model = moeroute.wrap_model(base, "molora", target_modules=["q_proj"])
    counters = []
    for host in (m for m in model.modules() if isinstance(m, SiteHost)):
        mixture = host.active_module()
        mixture.router = Counting(mixture.router)
        counters.append(mixture.router)
    return model, counters


@pytest.mark.parametrize("recomputes", [False, True])
def test_each_training_forward_is_shown_once(recomputes):
    model, counters = counted_llama()
    model.train()
    if recomputes:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(0, 31, (2, 5))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    assert [len(counter.seen) for counter in counters] == [2, 2]
    assert counters[0].seen[0].sequence_shape == (2, 5)
    assert [counter.steps for counter in counters] == [0, 0]
    moeroute.post_step(model)
    assert [counter.steps for counter in counters] == [1, 1]


def test_a_layer_on_its_own_is_shown_a_recomputation_neither():
    from moeroute.layers import LoRABank, LoRAMixture
    from moeroute.routers import ComposedRouter, LinearScore, TopK

    router = Counting(ComposedRouter(LinearScore(4, 2), TopK(1)))
    bank = LoRABank(num_experts=2, r=1, in_features=4, out_features=4, lora_alpha=1.0)
    mixture, base = LoRAMixture(router=router, bank=bank), nn.Linear(4, 4)
    x = torch.randn(3, 4, requires_grad=True)
    checkpoint(mixture, x, base, use_reentrant=False).sum().backward()
    assert len(router.seen) == 1


def test_evaluation_is_not_shown():
    model, counters = counted_llama()
    model.eval()(input_ids=torch.randint(0, 31, (2, 5)))
    assert counters[0].seen == []


def test_a_moe_layers_own_bias_balances_itself():
    from moeroute.routers import deepseek_v3_router

    layer = moeroute.MoELayer.build(hidden_size=4, intermediate_size=8, num_experts=4, top_k=1)
    layer.router = deepseek_v3_router(4, 4, 1)
    layer.train()(torch.ones(1, 6, 4)).sum().backward()
    moeroute.post_step(layer)
    bias = layer.router.select.selection_bias
    moved = bias.e_score_correction_bias / bias.update_rate
    assert sorted(moved.tolist()) == pytest.approx([-1, 1, 1, 1])


def test_compiled_training_counts_the_same():
    biases = []
    for compiling in (False, True):
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=31,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )
        model = moeroute.wrap_model(base, "smora", target_modules=["q_proj"], r=6, top_k=2).train()
        forward = torch.compile(model, backend="aot_eager") if compiling else model
        for seed in range(3):
            ids = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(seed))
            for _ in range(2):
                forward(input_ids=ids, labels=ids).loss.backward()
            moeroute.post_step(model)
        found = [v for k, v in model.state_dict().items() if k.endswith("correction_bias")]
        biases.append(torch.stack(found))
    assert biases[0].abs().sum() > 0
    assert torch.equal(biases[0], biases[1])
