"""Routers that a sample's label can overrule: the expert it was made for.

A label is an expert's index, given as the sample's task id.

Axes: B samples, T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moeroute.routers.composed import ComposedRouter
from moeroute.routers.samples import require_task_ids, to_tokens
from moeroute.routers.scores import Score
from moeroute.routers.select import All, Select, TopKSoftmax
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


class HardOrSoft(nn.Module):
    """The label's expert where there is a label; else all experts in training, and few in eval.

        training, labelled:   w = 1 for the one expert that the sample's label names
        training, unlabelled: w = softmax(logits) over all experts
        eval:                 w = softmax over the top-k logits; labels are not looked at

    The logits of labelled samples carry no gradient: a label leaves nothing to be learned.

    Args:
        score: Over all experts; a logit of -inf is an expert that is absent.
        top_k: Experts per token in eval.

    Shapes:
        router_logits: (T, E); routing_weights, selected_experts: (T, E) in training, else (T, K).

    Raises:
        ValueError: top_k is below 1 or above E; in a training forward, task_ids that are not one
            integer a sample, or one of E or more. Below 0 means unlabelled, and so does no
            task_ids at all.
    """

    def __init__(self, score: Score, top_k: int) -> None:
        super().__init__()
        self.composed = ComposedRouter(score, TopKSoftmax(top_k))
        self.soft = All()
        self.num_experts = score.num_experts

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        if not self.training:
            return self.composed(router_input)
        router_logits = self.composed.score(router_input)
        selection = self.soft(router_logits)
        weights = selection.routing_weights
        if router_input.task_ids is not None:
            labels = self._labels(router_input)  # (T,)
            hard = (labels >= 0).unsqueeze(1)
            named = labels.unsqueeze(1) == torch.arange(self.num_experts, device=labels.device)
            weights = torch.where(hard, named.to(weights.dtype), weights)
            router_logits = torch.where(hard, router_logits.detach(), router_logits)
        return RouterOutput(
            router_logits=router_logits,
            routing_weights=weights,
            selected_experts=selection.selected_experts,
        )

    def _labels(self, router_input: RouterInput) -> Tensor:
        """(T,) int64, below 0 for tokens of unlabelled samples."""
        task_ids = router_input.task_ids
        assert task_ids is not None
        named = replace(router_input, task_ids=task_ids.clamp(min=0))
        labels = require_task_ids(named, self.num_experts, "training by label")
        unlabelled = (task_ids < 0).to(labels.device)
        return to_tokens(labels.masked_fill(unlabelled, -1), router_input.sequence_shape)
