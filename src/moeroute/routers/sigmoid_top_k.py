"""Sigmoid scores with a balancing bias, chosen top-k, gated by their share of the chosen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.routers.select import Selection
from moeroute.routers.selection_bias import SelectionBias

LEAST_SCORE = 1e-6


class SigmoidTopK(nn.Module):
    """The k experts of highest biased sigmoid score; their gates sum to k.

        s = sigmoid(logits);  ids = the k highest of s + b;  w = k * v / sum of v
        v = s + b of the chosen, or s alone

    A score that the bias has pushed below 1e-6 counts as 1e-6, so that gates stay positive. With
    one slot the gate is constant and carries no gradient to the router.

    Args:
        top_k: K, at least 1.
        selection_bias: b.
        bias_in_gate: Whether b is part of the gates too, or of the choice alone.

    Shapes:
        routing_weights, selected_experts: (T, K), highest biased score first.

    Raises:
        ValueError: top_k is below 1, or (when a router is made) above the number of experts, or the
            bias is of another number.
    """

    def __init__(
        self,
        top_k: int,
        *,
        selection_bias: SelectionBias,
        bias_in_gate: bool = True,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.selection_bias = selection_bias
        self.bias_in_gate = bias_in_gate

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k or the bias does not fit the number of experts."""
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(
                f"top_k={self.top_k} is outside 1..{num_experts}, the number of experts; lower "
                "top_k or raise num_experts"
            )
        size = self.selection_bias.e_score_correction_bias.shape[0]
        if size != num_experts:
            raise ValueError(
                f"the selection bias has {size} experts but the router {num_experts}; make it "
                f"SelectionBias({num_experts})"
            )

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        scores = torch.sigmoid(router_logits)
        biased = self.selection_bias(scores)
        chosen = torch.topk(biased, self.top_k, dim=-1).indices
        kept = (biased if self.bias_in_gate else scores).gather(-1, chosen).clamp(min=LEAST_SCORE)
        weights = kept * (self.top_k / kept.sum(dim=-1, keepdim=True))
        return Selection(routing_weights=weights, selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}, bias_in_gate={self.bias_in_gate}"
