"""MoLoRA against its equation, and its limits."""

import pytest
import torch
from torch import nn

from moeroute.integration.adapters.sites import make_site
from moeroute.methods import MoLoRA


def build(top_k=None, num_experts=4):
    torch.manual_seed(0)
    base = nn.Linear(5, 7).double()
    site = make_site(base, "q_proj", base, "linear")
    mixture = (
        MoLoRA(r=2, num_experts=num_experts, lora_alpha=3.0, top_k=top_k).build(site, None).double()
    )
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.5)
    return base, mixture


def by_the_paper(base, mixture, x, top_k):
    weights = torch.softmax(x @ mixture.router.score.weight.T, dim=-1)
    if top_k is not None:
        kept, chosen = weights.topk(top_k, dim=-1)
        weights = torch.zeros_like(weights).scatter(-1, chosen, kept / kept.sum(-1, keepdim=True))
    bank = mixture.bank
    a = bank.lora_a.unflatten(0, (-1, bank.r))
    b = bank.lora_b.unflatten(1, (-1, bank.r))
    return base(x) + bank.scaling * torch.einsum("te,oer,erh,th->to", weights, b, a, x)


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_output_and_gradients_equal_the_equation(top_k):
    base, mixture = build(top_k)
    x = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    ours, paper = mixture(x, base), by_the_paper(base, mixture, x, top_k)
    torch.testing.assert_close(ours, paper)
    inputs, upstream = [x, *mixture.parameters()], torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(paper, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_one_expert_is_plain_lora():
    base, mixture = build(num_experts=1)
    x = torch.randn(6, 5, dtype=torch.double)
    bank = mixture.bank
    torch.testing.assert_close(
        mixture(x, base), base(x) + bank.scaling * (x @ bank.lora_a.T) @ bank.lora_b.T
    )


def test_a_soft_mixture_weighs_every_expert():
    base, mixture = build()
    kept = []
    with mixture.routing_pass.listening(kept.append):
        mixture(torch.randn(2, 3, 5, dtype=torch.double), base)
    weights = kept[0].routing.routing_weights
    assert weights.shape == (6, 4)
    assert torch.all(weights > 0)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))


def test_rank_stabilised_scaling():
    linear = nn.Linear(5, 7)
    site = make_site(linear, "q_proj", linear, "linear")
    assert MoLoRA(r=4, lora_alpha=8.0).build(site, None).bank.scaling == 2.0
    assert MoLoRA(r=4, lora_alpha=8.0, use_rslora=True).build(site, None).bank.scaling == 4.0
