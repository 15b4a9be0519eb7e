"""Routers that a sample's label can overrule: the expert it was made for.

A label is an expert's index, given as the sample's task id.

Axes: B samples, T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.routers.composed import ComposedRouter
from moeroute.routers.samples import require_task_ids, to_tokens
from moeroute.routers.scores import Score
from moeroute.routers.select import Select
from moeroute.types import RouterInput, RouterOutput


class OneGateInTraining(nn.Module):
    """In training the label's expert alone, opened by its own gate; else a score and a selection.

        training: w = sigmoid(logits_label) for the one expert that the sample's label names
        eval:     as `ComposedRouter(score, select)`; labels are not looked at

    So each expert's gate learns from its own samples as if the others were not there, and one run
    over samples of all experts trains all gates.

    Args:
        score: Over all experts; a logit of -inf, an expert that is absent, leaves the slot empty.
        select: Who is chosen in eval.

    Shapes:
        router_logits: (T, E); routing_weights, selected_experts: (T, 1) in training, else (T, K).

    Raises:
        ValueError: In a training forward, no task_ids or one outside [0, E).
    """

    def __init__(self, score: Score, select: Select) -> None:
        super().__init__()
        self.composed = ComposedRouter(score, select)
        self.num_experts = score.num_experts

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        if not self.training:
            return self.composed(router_input)
        labels = require_task_ids(router_input, self.num_experts, "the training of gates")
        router_logits = self.composed.score(router_input)
        chosen, own = _slot_of(to_tokens(labels, router_input.sequence_shape), router_logits)
        return RouterOutput(
            router_logits=router_logits,
            routing_weights=torch.sigmoid(own),
            selected_experts=chosen,
        )


def _slot_of(labels: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(T, 1) ids, E where the labelled expert is absent, and (T, 1) logits of the label."""
    size = router_logits.shape[-1]
    own = router_logits.gather(1, labels.unsqueeze(1))
    return labels.unsqueeze(1).masked_fill(torch.isneginf(own), size), own
