"""A toy: two clusters of tokens, each with a linear map of its own, and two experts."""

import math

import torch
from methods.beside import record_of
from torch import nn

import moeroute

COUNT = 200


def information_learned(base: nn.Module, mixture: nn.Module, width: int, steps: int = 300) -> float:
    """Train a mixture on the toy.

    Args:
        base: What the mixture stands beside, float64.
        mixture: Float64, of two experts.
        width: Of the tokens.
        steps: Of Adam.

    Returns:
        The bits that an expert, drawn by a token's weights, says of the token's cluster; at most 1.
    """
    torch.manual_seed(0)
    label = torch.arange(COUNT) % 2
    center = torch.zeros(2, width, dtype=torch.double)
    center[0, 0], center[1, 0] = 3.0, -3.0
    x = center[label] + 0.3 * torch.randn(COUNT, width, dtype=torch.double)
    out = base(x).detach()
    maps = torch.randn(2, out.shape[1], width, dtype=torch.double) / 2
    target = out + torch.einsum("toi,ti->to", maps[label], x)
    optimizer = torch.optim.Adam(mixture.train().parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        error = (mixture(x, base) - target).square().mean()
        (error + moeroute.aux_losses(mixture).total).backward()
        optimizer.step()
    weights = weights_of(record_of(mixture.eval(), base, x).routing)
    joint = torch.stack([weights[label == cluster].sum(0) for cluster in range(2)])
    joint = joint / joint.sum()
    independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    return (torch.special.xlogy(joint, joint / independent).sum() / math.log(2)).item()


def weights_of(routing: moeroute.types.RouterOutput) -> torch.Tensor:
    """(T, 2) of what each expert gets of each token."""
    weights = torch.zeros(len(routing.router_logits), 3, dtype=torch.double)
    added = weights.scatter_add(1, routing.selected_experts, routing.routing_weights.double())
    return added[:, :2].detach()
