"""MixLoRA against its equation, expert by expert."""

import torch
from methods.two_clusters import information_learned
from torch import nn
from torch.nn import functional

from moeroute.integration.adapters.sites import make_site
from moeroute.methods import MixLoRA


class GatedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(6, 10, bias=False)
        self.up_proj = nn.Linear(6, 10, bias=False)
        self.down_proj = nn.Linear(10, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 10)
        self.fc2 = nn.Linear(10, 6)
        self.act_fn = nn.GELU()

    def forward(self, x):
        return self.fc2(self.act_fn(self.fc1(x)))


def build(block, **fields):
    torch.manual_seed(0)
    base = block().double()
    site = make_site(base, "mlp", base, "mlp")
    mixture = MixLoRA(r=2, num_experts=4, lora_alpha=3.0, **fields).build(site, None).double()
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.5)
    return base, mixture


def delta(bank, expert, x):
    a = bank.lora_a[expert * bank.r : (expert + 1) * bank.r]
    b = bank.lora_b[:, expert * bank.r : (expert + 1) * bank.r]
    return bank.scaling * (x @ a.T) @ b.T


def expert_block(base, mixture, expert, x):
    banks = mixture.banks
    if "gate" in banks:
        gate = base.gate_proj(x) + delta(banks["gate"], expert, x)
        hidden = functional.silu(gate) * (base.up_proj(x) + delta(banks["up"], expert, x))
        down = base.down_proj
    else:
        hidden = functional.gelu(base.fc1(x) + delta(banks["up"], expert, x))
        down = base.fc2
    return down(hidden) + delta(banks["down"], expert, hidden)


def by_the_paper(base, mixture, x, top_k):
    probs = torch.softmax(x @ mixture.router.score.weight.T, dim=-1)
    weights, chosen = probs.topk(top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    rows = []
    for token, (token_weights, experts) in enumerate(zip(weights, chosen, strict=True)):
        parts = [
            w * expert_block(base, mixture, int(e), x[token])
            for w, e in zip(token_weights, experts, strict=True)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def test_output_and_gradients_equal_the_equation():
    for block in (GatedBlock, PlainBlock):
        for top_k in (1, 2, 4):
            base, mixture = build(block, top_k=top_k)
            x = torch.randn(5, 6, dtype=torch.double, requires_grad=True)
            ours = mixture(x, base)
            paper = by_the_paper(base, mixture, x, top_k)
            torch.testing.assert_close(ours, paper)
            inputs = [x, *mixture.parameters()]
            upstream = torch.randn_like(ours)
            got = torch.autograd.grad(ours, inputs, upstream, allow_unused=True)
            want = torch.autograd.grad(paper, inputs, upstream, allow_unused=True)
            for left, right in zip(got, want, strict=True):
                torch.testing.assert_close(left, torch.zeros_like(left) if right is None else right)


def test_one_router_a_block_and_the_papers_parameter_count():
    _, mixture = build(GatedBlock)
    experts, rank, width, inner = 4, 2, 6, 10
    expected = experts * rank * 3 * (width + inner) + experts * width
    assert sum(parameter.numel() for parameter in mixture.parameters()) == expected


def test_chosen_slots_count_top_k_times_the_tokens():
    base, mixture = build(GatedBlock, top_k=2)
    kept = []
    with mixture.routing_pass.listening(kept.append):
        mixture(torch.randn(3, 7, 6, dtype=torch.double), base)
    assert kept[0].routing.selected_experts.shape == (21, 2)
    assert torch.all(kept[0].routing.selected_experts < 4)


def test_a_router_tells_two_clusters_apart():
    base, _ = build(GatedBlock)
    site = make_site(base, "mlp", base, "mlp")
    method = MixLoRA(r=2, num_experts=2, top_k=1, router_aux_loss_coef=0.1)
    assert information_learned(base, method.build(site, None).double(), 6, steps=600) > 0.9
