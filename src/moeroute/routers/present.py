"""A score in which some experts cannot be chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeroute.routers.scores import Score
from moeroute.types import RouterInput


class PresentScore(nn.Module):
    """Another score with minus infinity for the experts that are not there.

    Where adapters of different targets are mixed, an adapter that says nothing of this linear must
    take no part of the softmax.

    Args:
        score: Over all experts.
        present: Whether each expert is there; at least one is.

    Shapes:
        router_logits: (T, E), -inf where an expert is absent.

    Raises:
        ValueError: No expert is there, or `present` speaks of another number of experts.
    """

    score: Score
    present: Tensor

    def __init__(self, score: Score, present: Sequence[bool]) -> None:
        super().__init__()
        if len(present) != score.num_experts or not any(present):
            raise ValueError(
                f"present={list(present)} for {score.num_experts} experts: give one truth value an "
                "expert, at least one of them True"
            )
        self.score = score
        self.num_experts = score.num_experts
        self.register_buffer("present", torch.tensor(present), persistent=False)

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        return self.score(router_input).masked_fill(~self.present, float("-inf"))
