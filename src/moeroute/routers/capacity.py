"""Experts that take only so many rows: who does not fit is dropped, or goes elsewhere.

Axes: T tokens, K slots per token, E experts, C rows an expert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moeroute.ops.load import tokens_per_expert
from moeroute.ops.probs import TINY, softmax_probs
from moeroute.ops.queue import places_in_queue, rows_allowed
from moeroute.routers.select import Select, Selection, choose

Overflow = Literal["drop", "reroute"]
Priority = Literal["position", "weight"]


class Capacity(nn.Module):
    """Another selection whose experts take at most C = ceil(capacity_factor * T * K / E) rows.

    By position, first choices of all tokens come before second choices, and earlier tokens before
    later ones; by weight, the highest weights come first (batch-prioritised routing). What
    overflows leaves an empty slot: weights of the others are not raised. With "reroute" it goes to
    the token's best expert that has room, slot by slot, with that expert's probability times what
    the selection made of the first one's.

    Source: GShard, Lepikhin et al., 2020, arXiv 2006.16668, section 2.2; Switch Transformers, arXiv
    2101.03961, section 2.2; by weight: V-MoE, arXiv 2106.05974, section 4. Re-routing is our own
    reading of Switch's appendix B ("No-Token-Left-Behind").

    Args:
        select: What is limited.
        capacity_factor: Above 0.
        overflow: "drop" or "reroute".
        priority: "position" or "weight".
        rounds: With "reroute": how often a slot may try; after E times all that can fit have a
            place.

    Shapes:
        As the selection's; C counts real tokens, and padding takes no place.

    Raises:
        ValueError: capacity_factor is not above 0, or a word is unknown.
    """

    select: Select

    def __init__(
        self,
        select: Select,
        *,
        capacity_factor: float,
        overflow: Overflow = "drop",
        priority: Priority = "position",
        rounds: int = 2,
    ) -> None:
        super().__init__()
        if capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor={capacity_factor} gives experts a capacity of 0, which drops "
                "every token; use 1.25, say"
            )
        if overflow not in ("drop", "reroute"):
            raise ValueError(f"overflow={overflow!r} is unknown; use 'drop' or 'reroute'")
        if priority not in ("position", "weight"):
            raise ValueError(f"priority={priority!r} is unknown; use 'position' or 'weight'")
        self.select = select
        self.capacity_factor = capacity_factor
        self.overflow = overflow
        self.priority = priority
        self.rounds = rounds

    def check(self, num_experts: int) -> None:
        """Raise ValueError if the selection does not fit the number of experts."""
        self.select.check(num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for (T, E) logits of real tokens."""
        return self.among(router_logits, None)

    def among(self, router_logits: Tensor, token_mask: Tensor | None) -> Selection:
        """Choose for (T, E) logits; padding has empty slots."""
        size = router_logits.shape[-1]
        wanted = choose(self.select, router_logits, token_mask)
        ids, weights = wanted.selected_experts, wanted.routing_weights
        if token_mask is not None:
            ids = ids.masked_fill(~token_mask.to(torch.bool).unsqueeze(1), size)
        share = self.capacity_factor * ids.shape[1] / size
        capacity = rows_allowed(ids.shape[0], share, token_mask)
        by_slot = weights.T.reshape(-1) if self.priority == "weight" else None
        places = places_in_queue(ids.T.reshape(-1), size, by_slot)
        kept = capacity > places.reshape(ids.T.shape).T  # (T, K)
        left = ids.masked_fill(~kept, size)
        if self.overflow == "reroute":
            lost = (ids < size) & ~kept
            left, weights = self._reroute(router_logits, ids, left, weights, lost, capacity)
        return Selection(
            routing_weights=weights.masked_fill(left == size, 0.0),
            selected_experts=left,
            max_assignments=wanted.max_assignments,
        )

    def _reroute(
        self,
        router_logits: Tensor,
        ids: Tensor,
        left: Tensor,
        weights: Tensor,
        lost: Tensor,
        capacity: Tensor | int,
    ) -> tuple[Tensor, Tensor]:
        """(T, K) ids and weights with each lost slot at an expert that has room, where there is."""
        size = router_logits.shape[-1]
        probs = softmax_probs(router_logits)
        first = probs.gather(1, ids.clamp(max=size - 1))
        factor = weights / first.clamp(min=TINY)  # what the selection made of a probability
        for _ in range(self.rounds):
            for slot in range(ids.shape[1]):
                room = capacity - tokens_per_expert(left, size)  # (E,)
                held = torch.zeros_like(probs[:, :1], dtype=torch.bool).expand(-1, size + 1)
                held = held.scatter(1, left, value=True)[:, :size]
                wish = probs.detach().masked_fill(held | (room <= 0), -1.0)
                best, target = wish.max(dim=1)
                asks = lost[:, slot] & (left[:, slot] == size) & (best >= 0)
                target = torch.where(asks, target, size)
                fits = asks & (places_in_queue(target, size) < room[target.clamp(max=size - 1)])
                column = torch.arange(ids.shape[1], device=ids.device) == slot
                here = fits.unsqueeze(1) & column
                left = torch.where(here, target.unsqueeze(1), left)
                new = factor * probs.gather(1, target.clamp(max=size - 1).unsqueeze(1))
                weights = torch.where(here, new, weights)
        return left, weights

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return (
            f"capacity_factor={self.capacity_factor:g}, overflow={self.overflow}, "
            f"priority={self.priority}"
        )
