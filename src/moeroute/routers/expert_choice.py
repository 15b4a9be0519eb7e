"""Experts choose tokens.

Axes: T tokens, E experts, C tokens an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeroute.ops.exact import uncast
from moeroute.ops.probs import softmax_probs
from moeroute.ops.queue import places_in_columns, rows_allowed
from moeroute.ops.ranks import sum_over_ranks
from moeroute.routers.positive import fill_slots
from moeroute.routers.select import Selection
from moeroute.types import RoutingRecord


class ExpertChoice(nn.Module):
    """Every expert takes its C tokens of highest probability; a token has 0 to E experts.

        p = softmax_e(logits);  C = ceil(capacity_factor * T / E)
        training:        expert e takes the C highest of column e;  w = p
        eval and causal: expert e takes token t if p[t, e] >= threshold_e

    The load is flat by construction. But whether a token is chosen depends on the other tokens of
    the batch, later ones too, so that a language model would see its own future: in eval each
    expert compares with a threshold instead, its mean cut-off in training, which
    `moeroute.post_step` follows once an optimizer step. Training still looks ahead.

    Source: Mixture-of-Experts with Expert Choice Routing, Zhou et al., 2022, arXiv 2202.09368,
    section 3.2; the thresholds are our own reading.

    Args:
        num_experts: E.
        capacity_factor: Experts a token has on average, above 0.
        causal: Use the thresholds in eval; False chooses among the batch in eval too.
        momentum: Share of the old threshold in the new one, in [0, 1).

    Shapes:
        thresholds: (E,) float32, saved; 1 / E at first.
        routing_weights, selected_experts: (T, E), expert e in slot e, else an empty slot. C counts
            real tokens, and padding is never chosen.

    Raises:
        ValueError: A number is out of range, or (when a router is made) another number of experts.
    """

    thresholds: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        causal: bool = True,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if num_experts < 1 or capacity_factor <= 0 or not 0.0 <= momentum < 1.0:
            raise ValueError(
                f"num_experts={num_experts}, capacity_factor={capacity_factor}, "
                f"momentum={momentum}: at least 1, above 0 and in [0, 1)"
            )
        self.capacity_factor = capacity_factor
        self.causal = causal
        self.momentum = momentum
        self.register_buffer("thresholds", torch.full((num_experts,), 1.0 / num_experts))
        self._seen: Tensor | None = None  # (E + 1,) sums of cut-offs, and of how many forwards

    def check(self, num_experts: int) -> None:
        """Raise ValueError if the thresholds are of another number of experts."""
        if self.thresholds.shape[0] != num_experts:
            raise ValueError(
                f"ExpertChoice has {self.thresholds.shape[0]} experts but the router "
                f"{num_experts}; make it ExpertChoice({num_experts})"
            )

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for (T, E) logits of real tokens."""
        return self.among(router_logits, None)

    def among(self, router_logits: Tensor, token_mask: Tensor | None) -> Selection:
        """Choose for (T, E) logits; padding is never chosen."""
        probs = softmax_probs(router_logits)
        if self.causal and not self.training:
            taken = ~(probs.detach() < self.thresholds)  # so that a NaN is taken, and shows
        else:
            taken = places_in_columns(probs, token_mask) < self._capacity(probs, token_mask)
        if token_mask is not None:
            taken = taken & token_mask.to(torch.bool).unsqueeze(1)
        filled = fill_slots(probs.masked_fill(~taken, 0.0))
        bound = None
        if self.training or not self.causal:
            size = probs.shape[1]
            bound = size * math.ceil(probs.shape[0] * self.capacity_factor / size)
        return Selection(
            routing_weights=filled.routing_weights,
            selected_experts=torch.where(taken, filled.selected_experts, probs.shape[1]),
            max_assignments=bound,
        )

    def observe(self, record: RoutingRecord) -> None:
        """Take note of each expert's cut-off in one training forward."""
        if not self.causal:
            return
        probs = softmax_probs(record.routing.router_logits.detach())
        if not probs.shape[0]:
            return
        last = self._capacity(probs, record.token_mask) - 1
        at_cut = places_in_columns(probs, record.token_mask) == last  # one token an expert, or none
        cut = probs.masked_fill(~at_cut, 0.0).nan_to_num().sum(0)
        seen = torch.cat([cut, cut.new_ones(1) * (last >= 0)])  # padding alone counts as none
        self._seen = seen if self._seen is None else self._seen.to(seen) + seen

    @torch.no_grad()
    def post_step(self) -> None:
        """Move the thresholds toward the mean cut-offs since the last step, over all ranks."""
        if not self.causal:
            return
        seen = self._seen
        if seen is None:  # other ranks may have seen some
            seen = torch.zeros(self.thresholds.shape[0] + 1)
        sums = sum_over_ranks(seen.to(self.thresholds))
        mean = sums[:-1] / sums[-1].clamp(min=1)
        kept = torch.where(sums[-1] > 0, self.momentum, 1.0)
        self.thresholds.mul_(kept).add_((1.0 - kept) * mean)
        self._seen = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001
        kept = self.thresholds
        super()._apply(fn, recurse)
        self.thresholds = uncast(kept, self.thresholds)
        return self

    def _capacity(self, probs: Tensor, token_mask: Tensor | None) -> Tensor | int:
        return rows_allowed(probs.shape[0], self.capacity_factor / probs.shape[1], token_mask)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        size = self.thresholds.shape[0]
        return f"num_experts={size}, capacity_factor={self.capacity_factor:g}, causal={self.causal}"
