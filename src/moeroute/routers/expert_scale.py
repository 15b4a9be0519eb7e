"""A selection whose weights each expert scales for itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.routers.select import Select, Selection


class ExpertScale(nn.Module):
    """Multiplies a selection's weights by one learned number an expert (Gemma 4).

    Args:
        select: Who is chosen, and how much before scaling; without empty slots.
        num_experts: E.

    Shapes:
        per_expert_scale: (E,), ones at first.
        routing_weights, selected_experts: as the selection's.
    """

    select: Select

    def __init__(self, select: Select, num_experts: int) -> None:
        super().__init__()
        self.select = select
        self.per_expert_scale = nn.Parameter(torch.ones(num_experts))

    def check(self, num_experts: int) -> None:
        """Raise ValueError if the selection or the scales do not fit the number of experts."""
        self.select.check(num_experts)
        if self.per_expert_scale.shape[0] != num_experts:
            raise ValueError(
                f"there are {self.per_expert_scale.shape[0]} scales but num_experts={num_experts}; "
                f"make it ExpertScale(select, {num_experts})"
            )

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        chosen = self.select(router_logits)
        scales = self.per_expert_scale.to(chosen.routing_weights.dtype)
        return Selection(
            routing_weights=chosen.routing_weights * scales[chosen.selected_experts],
            selected_experts=chosen.selected_experts,
            max_assignments=chosen.max_assignments,
        )
