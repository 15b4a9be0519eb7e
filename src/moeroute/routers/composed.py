"""A router is a score, then a selection."""

from __future__ import annotations

from torch import nn

from moeroute.ops.debug import check_finite
from moeroute.types import RouterInput, RouterOutput


class ComposedRouter(nn.Module):
    """The one router class: what differs between papers is passed in.

    Args:
        score: A `moeroute.routers.Score`: tokens to logits.
        select: A `moeroute.routers.Select`: logits to who and how much.

    Shapes:
        router_logits: (T, E) float32, raw.
        routing_weights, selected_experts: (T, K).

    Raises:
        ValueError: The selection does not fit the number of experts; in forward, with
            MOEROUTE_DEBUG=1, NaN logits.
    """

    def __init__(self, score: nn.Module, select: nn.Module) -> None:
        super().__init__()
        self.num_experts: int = score.num_experts  # type: ignore[assignment]
        select.check(self.num_experts)  # type: ignore[operator]
        self.score = score
        self.select = select

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        router_logits = self.score(router_input)
        check_finite(router_logits)
        selection = self.select(router_logits)
        return RouterOutput(
            router_logits=router_logits,
            routing_weights=selection.routing_weights,
            selected_experts=selection.selected_experts,
            max_assignments=selection.max_assignments,
        )
