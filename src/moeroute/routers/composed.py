"""A router is a score, then a selection."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from moeroute.ops.debug import check_router_logits
from moeroute.routers.scores import Score
from moeroute.routers.select import Select, choose
from moeroute.types import RouterInput, RouterOutput


class ComposedRouter(nn.Module):
    """The one router class: what differs between papers is passed in.

    Computed in float32 or wider, autocast or not (see `LinearScore.compute_dtype`).

    Args:
        score: Tokens to logits, such as `LinearScore`.
        select: Logits to who and how much, such as `TopK`.

    Shapes:
        hidden_states: (T, H), any floating dtype.
        router_logits: (T, E) float32 (float64 for float64 tokens), raw.
        routing_weights, selected_experts: (T, K).

    Raises:
        ValueError: The selection does not fit the number of experts; in forward, with
            MOEROUTE_DEBUG=1 in the environment, NaN logits (otherwise such a token's ids are in
            range and its output is NaN).

    Example:
        >>> router = ComposedRouter(LinearScore(64, 8), TopK(2))
    """

    score: Score
    select: Select

    def __init__(self, score: Score, select: Select) -> None:
        super().__init__()
        select.check(score.num_experts)
        self.num_experts = score.num_experts
        self.in_features = score.in_features if isinstance(score, _HasWidth) else None
        self.score = score
        self.select = select

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        router_logits = self.score(router_input)
        check_router_logits(router_logits)
        selection = choose(self.select, router_logits, router_input.token_mask)
        return RouterOutput(
            router_logits=router_logits,
            routing_weights=selection.routing_weights,
            selected_experts=selection.selected_experts,
            max_assignments=selection.max_assignments,
        )


@runtime_checkable
class _HasWidth(Protocol):
    """A score that takes tokens of one width (a hash of token ids does not)."""

    in_features: int
