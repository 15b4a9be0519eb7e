"""Selections: logits to who and how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moeroute.ops.probs import sigmoid_probs, softmax_probs

Probs = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Who was chosen and how much.

    Attributes:
        routing_weights: (T, K) in the logits' dtype, 0 in an empty slot.
        selected_experts: (T, K) int64 in [0, E]; E marks an empty slot.
        max_assignments: Static bound on filled slots; None means T * K.
    """

    routing_weights: Tensor
    selected_experts: Tensor
    max_assignments: int | None = None


class Select(Protocol):
    """Anything that turns logits into a `Selection`."""

    def __call__(self, router_logits: Tensor, /) -> Selection:
        """(T, E) logits to (T, K) choices."""
        ...

    def check(self, num_experts: int, /) -> None:
        """Raise ValueError if this selection cannot work over so many experts."""
        ...


class TopK(nn.Module):
    """The k experts of highest probability.

        p = probs(logits);  ids = top-k of p (+ selection bias);  w = p[ids], normalised or not,
        scaled

    Args:
        top_k: K, at least 1.
        probs: Logits to probabilities; softmax over all experts by default.
        normalize: Divide each token's weights by their sum.
        normalize_eps: Added to that sum.
        routed_scaling_factor: Multiplies the weights at the end.
        selection_bias: Added to the probabilities for choosing only.

    Raises:
        ValueError: top_k is below 1, or (when a router is made) above the number of experts.
    """

    def __init__(
        self,
        top_k: int,
        *,
        probs: Probs = softmax_probs,
        normalize: bool = True,
        normalize_eps: float = 0.0,
        routed_scaling_factor: float = 1.0,
        selection_bias: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.probs = probs
        self.normalize = normalize
        self.normalize_eps = normalize_eps
        self.routed_scaling_factor = routed_scaling_factor
        self.selection_bias = selection_bias
        _check_top_k(top_k, None)

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k exceeds the number of experts."""
        _check_top_k(self.top_k, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """(T, E) logits to (T, K) choices, highest first."""
        router_probs = self.probs(router_logits)
        if self.selection_bias is None:
            weights, chosen = torch.topk(router_probs, self.top_k, dim=-1)
        else:
            scores = self.selection_bias(router_probs)
            chosen = torch.topk(scores, self.top_k, dim=-1, sorted=False).indices
            weights = router_probs.gather(-1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.normalize_eps)
        if self.routed_scaling_factor != 1.0:
            weights = weights * self.routed_scaling_factor
        return Selection(routing_weights=weights, selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}, normalize={self.normalize}"


class TopKSoftmax(nn.Module):
    """The k experts of highest logit, weighted by a softmax over the chosen logits.

    Equal to `TopK` with softmax and normalisation in exact arithmetic; checkpoints such as gpt-oss
    and Granite compute it this way.

    Args:
        top_k: K, at least 1.

    Raises:
        ValueError: top_k is below 1, or (when a router is made) above the number of experts.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        _check_top_k(top_k, None)

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k exceeds the number of experts."""
        _check_top_k(self.top_k, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """(T, E) logits to (T, K) choices, highest first."""
        kept, chosen = torch.topk(router_logits, self.top_k, dim=-1)
        return Selection(routing_weights=torch.softmax(kept, dim=-1), selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}"


class GroupTopK(nn.Module):
    """Top-k over the experts of the best groups only.

    Experts are cut into equal groups; a group's score is the sum of its two highest choosing
    scores; the experts outside the best groups are not choosable.

    Source: DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437, section 2.1.2, and transformers'
    implementation of it (which fixes the order of the operations).

    Args:
        top_k: K, at least 1.
        num_groups: Groups; divides the number of experts.
        top_k_groups: Groups kept a token.
        selection_bias: Added to the probabilities for choosing only.
        probs: Logits to probabilities; sigmoid by default.
        normalize: Divide each token's weights by their sum plus 1e-20.
        routed_scaling_factor: Multiplies the weights at the end.

    Raises:
        ValueError: Sizes that do not fit each other or the number of experts.
    """

    def __init__(
        self,
        top_k: int,
        *,
        num_groups: int,
        top_k_groups: int,
        selection_bias: nn.Module | None = None,
        probs: Probs = sigmoid_probs,
        normalize: bool = True,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        _check_top_k(top_k, None)
        if not 1 <= top_k_groups <= num_groups:
            raise ValueError(
                f"top_k_groups={top_k_groups} is outside 1..num_groups={num_groups}; lower "
                "top_k_groups"
            )
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_k_groups = top_k_groups
        self.selection_bias = selection_bias
        self.probs = probs
        self.normalize = normalize
        self.routed_scaling_factor = routed_scaling_factor

    def check(self, num_experts: int) -> None:
        """Raise ValueError if groups or top_k do not fit the number of experts."""
        if num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide num_experts={num_experts}; groups "
                "are equal"
            )
        if num_experts // self.num_groups < GROUP_SCORE_SIZE:
            raise ValueError(
                f"num_groups={self.num_groups} leaves {num_experts // self.num_groups} experts "
                f"a group; a group's score needs {GROUP_SCORE_SIZE}"
            )
        _check_top_k(self.top_k, num_experts * self.top_k_groups // self.num_groups)

    def forward(self, router_logits: Tensor) -> Selection:
        """(T, E) logits to (T, K) choices, in no order."""
        router_probs = self.probs(router_logits)
        bias = self.selection_bias
        choosing = router_probs if bias is None else bias(router_probs)
        by_group = choosing.unflatten(-1, (self.num_groups, -1))  # (T, G, E/G)
        group_scores = by_group.topk(GROUP_SCORE_SIZE, dim=-1).values.sum(dim=-1)
        best = torch.topk(group_scores, self.top_k_groups, dim=-1, sorted=False).indices
        open_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, value=True)
        choosable = by_group.masked_fill(~open_groups.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = torch.topk(choosable, self.top_k, dim=-1, sorted=False).indices
        weights = router_probs.gather(-1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Selection(
            routing_weights=weights * self.routed_scaling_factor, selected_experts=chosen
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}, num_groups={self.num_groups}, top_k_groups={self.top_k_groups}"


class All(nn.Module):
    """Every expert, weighted by its probability: a soft mixture.

    Args:
        probs: Logits to probabilities; softmax over all experts by default.
    """

    def __init__(self, *, probs: Probs = softmax_probs) -> None:
        super().__init__()
        self.probs = probs

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def forward(self, router_logits: Tensor) -> Selection:
        """(T, E) logits to (T, E) choices, expert e in slot e."""
        count = router_logits.shape[-1]
        everyone = torch.arange(count, device=router_logits.device)
        return Selection(
            routing_weights=self.probs(router_logits),
            selected_experts=everyone.expand(router_logits.shape[0], count),
        )


GROUP_SCORE_SIZE = 2


def _check_top_k(top_k: int, allowed: int | None) -> None:
    if top_k < 1:
        raise ValueError(f"top_k={top_k} is below 1; every token needs a slot")
    if allowed is not None and top_k > allowed:
        raise ValueError(
            f"top_k={top_k} exceeds the {allowed} experts that can be chosen; lower top_k or raise "
            "num_experts"
        )
