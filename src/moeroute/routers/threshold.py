"""A router that keeps the experts above a threshold which each token sets for itself."""

from __future__ import annotations

import torch
from torch import nn

from moeroute.ops.debug import check_router_logits
from moeroute.ops.probs import softmax_probs
from moeroute.outputs import ThresholdOutput
from moeroute.routers.scores import Score
from moeroute.types import RouterInput


class ThresholdRouter(nn.Module):
    """As many experts a token as have a probability above its threshold.

        p = softmax(logits);  tau = max_threshold * sigmoid(threshold(x))
        w = relu(p - tau) / sum of relu(p - tau)

    With max_threshold at most 1/E some expert always lies above the threshold, but for a token
    whose probabilities are equal and whose sigmoid has saturated; a token without experts has
    weights of 0. The threshold learns through the weights.

    Args:
        score: Tokens to logits.
        threshold: Tokens to one number, before the sigmoid: a score of one expert.
        max_threshold: In [0, 1]; 0 mixes all experts softly.

    Shapes:
        hidden_states: (T, H), any floating dtype.
        router_logits: (T, E) float32, or float64; thresholds: (T,).
        routing_weights, selected_experts: (T, E), expert e in slot e if it lies above the
            threshold, else an empty slot; weights sum to 1 per token, or to 0.

    Raises:
        ValueError: The threshold gives more than one number, or max_threshold is outside [0, 1].
    """

    score: Score
    threshold: Score

    def __init__(self, score: Score, threshold: Score, *, max_threshold: float) -> None:
        super().__init__()
        if threshold.num_experts != 1:
            raise ValueError(
                f"the threshold gives {threshold.num_experts} numbers a token; a token has one"
            )
        if not 0.0 <= max_threshold <= 1.0:
            raise ValueError(f"max_threshold={max_threshold} is outside [0, 1]")
        self.num_experts = score.num_experts
        self.score = score
        self.threshold = threshold
        self.max_threshold = max_threshold

    def forward(self, router_input: RouterInput) -> ThresholdOutput:
        """Route (T, H) tokens."""
        router_logits = self.score(router_input)
        check_router_logits(router_logits)
        thresholds = self.max_threshold * torch.sigmoid(self.threshold(router_input))  # (T, 1)
        excess = torch.relu(softmax_probs(router_logits) - thresholds)  # (T, E)
        total = excess.sum(dim=-1, keepdim=True)
        everyone = torch.arange(self.num_experts, device=router_logits.device)
        return ThresholdOutput(
            router_logits=router_logits,
            routing_weights=excess / torch.where(total == 0, 1.0, total),
            # a NaN is not at most 0: its slots stay filled, and show
            selected_experts=torch.where(excess <= 0, self.num_experts, everyone),
            thresholds=thresholds.squeeze(1),
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"max_threshold={self.max_threshold:g}"
