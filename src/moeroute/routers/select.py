"""Selections: logits to who and how much.

Axes: T tokens, E experts, K slots per token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moeroute.ops.probs import TINY, sigmoid_probs, softmax_probs
from moeroute.routers.selection_bias import SelectionBias

Probs = Callable[[Tensor], Tensor]
GROUP_SCORE_SIZE = 2


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
        """Choose K slots for each row of (T, E) logits."""
        ...

    def check(self, num_experts: int, /) -> None:
        """Raise ValueError if this selection cannot work over so many experts."""
        ...


class TopK(nn.Module):
    """The k experts of highest probability.

        p = probs(logits);  ids = the k highest of p + bias;  w = scaling * p[ids] / (sum + eps)

    The bias and the division are optional. With K = 1 and normalize the weight is always 1 and
    carries no gradient to the router: pass normalize=False, as Switch does.

    Args:
        top_k: K, at least 1.
        probs: Logits to probabilities, (T, E) to (T, E).
        normalize: Divide each token's weights by their sum.
        normalize_eps: Added to that sum.
        routed_scaling_factor: Multiplies the weights at the end.
        selection_bias: Added to the probabilities for choosing only.

    Shapes:
        routing_weights, selected_experts: (T, K), highest first.

    Raises:
        ValueError: top_k is below 1, or (when a router is made) above the number of experts.
    """

    selection_bias: SelectionBias | None

    def __init__(
        self,
        top_k: int,
        *,
        probs: Probs = softmax_probs,
        normalize: bool = True,
        normalize_eps: float = 0.0,
        routed_scaling_factor: float = 1.0,
        selection_bias: SelectionBias | None = None,
    ) -> None:
        super().__init__()
        _check_top_k(top_k)
        self.top_k = top_k
        self.probs = probs
        self.normalize = normalize
        self.normalize_eps = normalize_eps
        self.routed_scaling_factor = routed_scaling_factor
        self.selection_bias = selection_bias

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k or the bias does not fit the number of experts."""
        _check_top_k(self.top_k, num_experts)
        _check_bias(self.selection_bias, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        router_probs = self.probs(router_logits)
        if self.selection_bias is None:
            weights, chosen = torch.topk(router_probs, self.top_k, dim=-1)
        else:
            chosen = torch.topk(self.selection_bias(router_probs), self.top_k, dim=-1).indices
            weights = router_probs.gather(-1, chosen)
        if self.normalize:
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / (total + self.normalize_eps if self.normalize_eps else total)
        if self.routed_scaling_factor != 1.0:
            weights = weights * self.routed_scaling_factor
        return Selection(routing_weights=weights, selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return (
            f"top_k={self.top_k}, normalize={self.normalize}, "
            f"routed_scaling_factor={self.routed_scaling_factor:g}"
        )


class TopKSoftmax(nn.Module):
    """The k experts of highest logit, weighted by a softmax over the chosen logits.

    Equal to `TopK` with softmax and normalisation in exact arithmetic; checkpoints such as gpt-oss
    and Granite compute it this way.

    Args:
        top_k: K, at least 1.

    Shapes:
        routing_weights, selected_experts: (T, K), highest first; weights sum to 1 per token.

    Raises:
        ValueError: top_k is below 1, or (when a router is made) above the number of experts.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__()
        _check_top_k(top_k)
        self.top_k = top_k

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k exceeds the number of experts."""
        _check_top_k(self.top_k, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        kept, chosen = torch.topk(router_logits, self.top_k, dim=-1)
        return Selection(routing_weights=torch.softmax(kept, dim=-1), selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}"


class GroupTopK(nn.Module):
    """Top-k over the experts of the best groups only.

    Experts are cut into G equal groups; a group's score is the sum of its two highest choosing
    scores (p + bias); experts outside the best groups cannot be chosen. Weights are
    scaling * p[ids] / (sum + 1e-20), the bias left out.

    Source: DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437, section 2.1.2, and transformers'
    implementation of it, which fixes the order of the operations.

    Args:
        top_k: K, at least 1.
        num_groups: G; divides the number of experts.
        top_k_groups: Groups kept a token.
        selection_bias: Added to the probabilities for choosing only.
        probs: Logits to probabilities, (T, E) to (T, E).
        normalize: Divide each token's weights by their sum.
        routed_scaling_factor: Multiplies the weights at the end.

    Shapes:
        routing_weights, selected_experts: (T, K), in no particular order.

    Raises:
        ValueError: Sizes that do not fit each other or (when a router is made) the number of
            experts.
    """

    selection_bias: SelectionBias | None

    def __init__(
        self,
        top_k: int,
        *,
        num_groups: int,
        top_k_groups: int,
        selection_bias: SelectionBias | None = None,
        probs: Probs = sigmoid_probs,
        normalize: bool = True,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        _check_top_k(top_k)
        if not 1 <= top_k_groups <= num_groups:
            raise ValueError(
                f"top_k_groups={top_k_groups} is outside 1..{num_groups}, the number of groups; "
                "lower top_k_groups or raise num_groups"
            )
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_k_groups = top_k_groups
        self.selection_bias = selection_bias
        self.probs = probs
        self.normalize = normalize
        self.routed_scaling_factor = routed_scaling_factor

    def check(self, num_experts: int) -> None:
        """Raise ValueError if groups, top_k or the bias do not fit the number of experts."""
        if num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide num_experts={num_experts}; groups "
                "are equal, so choose a divisor"
            )
        _check_top_k(self.top_k, num_experts // self.num_groups * self.top_k_groups)
        _check_bias(self.selection_bias, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        router_probs = self.probs(router_logits)
        bias = self.selection_bias
        choosing = router_probs if bias is None else bias(router_probs)
        size = router_logits.shape[-1] // self.num_groups
        by_group = choosing.unflatten(-1, (self.num_groups, size))  # (T, G, E / G)
        group_scores = by_group.topk(min(GROUP_SCORE_SIZE, size), dim=-1).values.sum(dim=-1)
        best = torch.topk(group_scores, self.top_k_groups, dim=-1, sorted=False).indices
        shut = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, value=False)
        choosable = by_group.masked_fill(shut.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = torch.topk(choosable, self.top_k, dim=-1, sorted=False).indices
        weights = router_probs.gather(-1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
        weights = weights * self.routed_scaling_factor
        return Selection(routing_weights=weights, selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return (
            f"top_k={self.top_k}, num_groups={self.num_groups}, top_k_groups={self.top_k_groups}, "
            f"normalize={self.normalize}, routed_scaling_factor={self.routed_scaling_factor:g}"
        )


class All(nn.Module):
    """Every expert, weighted by its probability: a soft mixture.

    Args:
        probs: Logits to probabilities, (T, E) to (T, E).

    Shapes:
        routing_weights, selected_experts: (T, E), expert e in slot e.
    """

    def __init__(self, *, probs: Probs = softmax_probs) -> None:
        super().__init__()
        self.probs = probs

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def forward(self, router_logits: Tensor) -> Selection:
        """Weigh every expert for each row of (T, E) logits."""
        everyone = torch.arange(router_logits.shape[-1], device=router_logits.device)
        return Selection(
            routing_weights=self.probs(router_logits),
            selected_experts=everyone.expand(router_logits.shape),
        )


def _check_top_k(top_k: int, choosable: int | None = None) -> None:
    if top_k < 1:
        raise ValueError(f"top_k={top_k} is below 1; every token needs a slot")
    if choosable is not None and top_k > choosable:
        raise ValueError(
            f"top_k={top_k} exceeds the {choosable} experts that a token can choose from; lower "
            "top_k or raise num_experts"
        )


def _check_bias(bias: SelectionBias | None, num_experts: int) -> None:
    if bias is not None and bias.e_score_correction_bias.shape[0] != num_experts:
        raise ValueError(
            f"the selection bias has {bias.e_score_correction_bias.shape[0]} experts but the "
            f"router {num_experts}; make it SelectionBias({num_experts})"
        )
