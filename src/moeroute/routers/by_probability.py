"""Selections of as many experts as the probabilities call for.

Axes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.probs import TINY, sigmoid_probs, softmax_probs
from moeroute.routers.select import Probs, Selection, check_top_k


class TopP(nn.Module):
    """The fewest experts whose probabilities reach top_p together.

        p = softmax(logits), highest first;  kept: those before which the sum is below top_p
        w = p of the kept

    The expert that crosses top_p is kept, so that every token has one at least.

    Source: Harder Tasks Need More Experts: Dynamic Routing in MoE Models, Huang et al., 2024, arXiv
    2403.07652, section 2.2.

    Args:
        top_p: In (0, 1]; 1 keeps all experts.
        max_slots: The most experts a token may have; None: all.
        normalize: Divide each token's weights by their sum.

    Shapes:
        routing_weights, selected_experts: (T, K), highest first, then empty slots; K is max_slots,
            or E.

    Raises:
        ValueError: top_p is outside (0, 1], or max_slots is below 1 or (when a router is made)
            above the number of experts.
    """

    def __init__(
        self, top_p: float, *, max_slots: int | None = None, normalize: bool = False
    ) -> None:
        super().__init__()
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p={top_p} is outside (0, 1]")
        self.top_p = top_p
        self.max_slots = max_slots
        self.normalize = normalize

    def check(self, num_experts: int) -> None:
        """Raise ValueError if max_slots does not fit the number of experts."""
        if self.max_slots is not None and not 1 <= self.max_slots <= num_experts:
            raise ValueError(
                f"max_slots={self.max_slots} is outside 1..{num_experts}, the number of experts"
            )

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        size = router_logits.shape[-1]
        weights, order = torch.topk(softmax_probs(router_logits), self.max_slots or size, dim=-1)
        probs = weights.detach()
        kept = ~(probs.cumsum(-1) - probs >= self.top_p)  # so that a NaN is kept, and shows
        kept = kept | (torch.arange(probs.shape[-1], device=probs.device) == 0)
        weights = weights.masked_fill(~kept, 0.0)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Selection(routing_weights=weights, selected_experts=torch.where(kept, order, size))

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_p={self.top_p:g}, max_slots={self.max_slots}, normalize={self.normalize}"


class Threshold(nn.Module):
    """Every expert whose probability is above a fixed threshold, and the best few in any case.

        kept = p > threshold, or among the first `least`;  w = p of the kept  [/ sum]

    Args:
        threshold: In units of probability.
        least: Experts that a token has in any case; with 0 a token may have none.
        probs: Logits to probabilities, (T, E) to (T, E).
        normalize: Divide each token's weights by their sum.

    Shapes:
        routing_weights, selected_experts: (T, E), highest first, then empty slots.

    Raises:
        ValueError: The threshold is negative, or `least` is negative or (when a router is made)
            above the number of experts.
    """

    def __init__(
        self,
        threshold: float,
        *,
        least: int = 1,
        probs: Probs = sigmoid_probs,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if threshold < 0:
            raise ValueError(f"threshold={threshold} is below 0, as no probability is")
        if least < 0:
            raise ValueError(f"least={least} is below 0; 0 leaves tokens without experts")
        self.threshold = threshold
        self.least = least
        self.probs = probs
        self.normalize = normalize

    def check(self, num_experts: int) -> None:
        """Raise ValueError if `least` does not fit the number of experts."""
        check_top_k(max(self.least, 1), num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        size = router_logits.shape[-1]
        weights, order = torch.topk(self.probs(router_logits), size, dim=-1)
        kept = ~(weights <= self.threshold)  # so that a NaN is kept, and shows
        kept = kept | (torch.arange(size, device=weights.device) < self.least)
        weights = weights.masked_fill(~kept, 0.0)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
        return Selection(routing_weights=weights, selected_experts=torch.where(kept, order, size))

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"threshold={self.threshold:g}, least={self.least}, normalize={self.normalize}"
