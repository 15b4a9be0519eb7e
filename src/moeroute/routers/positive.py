"""Selections of the experts whose logit is above zero.

Axes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.routers.select import Selection


class Positive(nn.Module):
    """Every expert of positive logit, weighted by that logit: no top-k, no normalisation.

        w = relu(logits)

    How many experts a token has is learned; a token without any has weights of 0.

    Source: ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, Wang et al., 2024,
    arXiv 2412.14711, equation 4.

    Shapes:
        routing_weights, selected_experts: (T, E), expert e in slot e, else an empty slot.
    """

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        return fill_slots(torch.relu(router_logits))


class PositiveRMS(nn.Module):
    """Every expert of positive logit, its weight relative to the token's other weights.

        a = relu(logits);  w_e = g_e * a_e / sqrt(mean_e(a_e^2) + eps)

    The size of the logits says nothing but who is chosen: with g of 1 the squares of a token's
    weights sum to E, however few experts it has. A token without any has weights of 0, and its
    logits no gradient.

    Source: BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level
    Activation Sparsity, Song et al., 2025, arXiv 2507.08771, section 3.1.

    Args:
        num_experts: E.
        eps: Added to the mean square.

    Shapes:
        scale: (E,), g, ones at first.
        routing_weights, selected_experts: (T, E), expert e in slot e, else an empty slot.

    Raises:
        ValueError: num_experts is below 1, or (when a router is made) another than the router's.
    """

    def __init__(self, num_experts: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} is below 1; a scale needs an expert")
        self.scale = nn.Parameter(torch.ones(num_experts))
        self.eps = eps

    def check(self, num_experts: int) -> None:
        """Raise ValueError if there is not one scale an expert."""
        if self.scale.shape[0] != num_experts:
            raise ValueError(
                f"PositiveRMS has {self.scale.shape[0]} experts but the router {num_experts}; make "
                f"it PositiveRMS({num_experts})"
            )

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        active = torch.relu(router_logits)
        selection = fill_slots(active)
        weights = unit_rms(active, eps=self.eps) * self.scale.to(active.dtype)
        return Selection(routing_weights=weights, selected_experts=selection.selected_experts)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"num_experts={self.scale.shape[0]}, eps={self.eps:g}"


def unit_rms(active: Tensor, *, eps: float) -> Tensor:
    """(T, E) rows divided by their root mean square; rows of zeros stay zero."""
    return active * torch.rsqrt(active.square().mean(dim=-1, keepdim=True) + eps)


def fill_slots(weights: Tensor) -> Selection:
    """(T, E) weights as they are, slots of weight 0 empty; a NaN stays filled, and shows."""
    size = weights.shape[-1]
    everyone = torch.arange(size, device=weights.device)
    return Selection(
        routing_weights=weights, selected_experts=torch.where(weights <= 0, size, everyone)
    )
