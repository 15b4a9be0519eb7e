"""Builds one mixture beside one linear in float64 and compares it with an equation."""

from dataclasses import replace

import torch
from torch import nn

from moeroute.integration.adapters.sites import make_site
from moeroute.types import Site

WIDTH, OUT = 5, 7


def site_at(layer_index: int = 0, num_layers: int = 1) -> tuple[nn.Linear, Site]:
    """A float64 linear and its site."""
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, OUT).double()
    site = make_site(base, "q_proj", base, "linear")
    return base, replace(site, layer_index=layer_index, num_layers=num_layers)


def awake(mixture: nn.Module) -> nn.Module:
    """The mixture in float64 with every parameter drawn."""
    for parameter in mixture.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixture


def assert_same_with_gradients(ours, reference, inputs):
    """Two outputs and all their gradients agree."""
    torch.testing.assert_close(ours, reference)
    upstream = torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(reference, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def loop_over_experts(base, mixture, x, weights_of):
    """One token and one expert after the other; weights_of gives a token's E weights."""
    bank, rows = mixture.bank, []
    for token in x:
        row = base(token)
        for expert, weight in enumerate(weights_of(token)):
            own = slice(expert * bank.r, (expert + 1) * bank.r)
            middle = bank.lora_a[own] @ token
            row = row + bank.scaling * weight * (bank.lora_b[:, own] @ middle)
        rows.append(row)
    return torch.stack(rows)


def record_of(mixture, base, x):
    """The record of one forward."""
    kept = []
    with mixture.routing_pass.listening(kept.append):
        mixture(x, base)
    return kept[0]
