"""Selections: logits to who and how much.

Axes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moeroute.ops.probs import softmax_probs
from moeroute.routers.selection_bias import SelectionBias

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
        """Choose K slots for each row of (T, E) logits."""
        ...

    def check(self, num_experts: int, /) -> None:
        """Raise ValueError if this selection cannot work over so many experts."""
        ...


@runtime_checkable
class SelectAmong(Protocol):
    """A selection in which tokens compete for experts, so that it must know which are real."""

    def among(self, router_logits: Tensor, token_mask: Tensor | None, /) -> Selection:
        """Choose for (T, E) logits; padding, False in the (T,) mask, gets empty slots.

        Padding takes nothing from real tokens, whatever its logits are.
        """
        ...


class TopK(nn.Module):
    """The k experts of highest probability.

        p = probs(logits);  ids = the k highest of p + bias;  w = scaling * p[ids] / (sum + eps)

    The bias and the division are optional; the sum may have a least value. With K = 1 and normalize
    the weight is always 1 and carries no gradient to the router: pass normalize=False, as Switch
    does.

    Args:
        top_k: K, at least 1.
        probs: Logits to probabilities, (T, E) to (T, E).
        normalize: Divide each token's weights by their sum.
        normalize_eps: Added to that sum.
        normalize_least: What that sum counts as where it is less; 0: nothing.
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
        normalize_least: float = 0.0,
        routed_scaling_factor: float = 1.0,
        selection_bias: SelectionBias | None = None,
    ) -> None:
        super().__init__()
        check_top_k(top_k)
        self.top_k = top_k
        self.probs = probs
        self.normalize = normalize
        self.normalize_eps = normalize_eps
        self.normalize_least = normalize_least
        self.routed_scaling_factor = routed_scaling_factor
        self.selection_bias = selection_bias

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k or the bias does not fit the number of experts."""
        check_top_k(self.top_k, num_experts)
        check_bias(self.selection_bias, num_experts)

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
            if self.normalize_least:
                total = total.clamp(min=self.normalize_least)
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
        check_top_k(top_k)
        self.top_k = top_k

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k exceeds the number of experts."""
        check_top_k(self.top_k, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        kept, chosen = torch.topk(router_logits, self.top_k, dim=-1)
        return Selection(routing_weights=torch.softmax(kept, dim=-1), selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}"


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


def choose(select: Select, router_logits: Tensor, token_mask: Tensor | None) -> Selection:
    """Ask a selection, which hears of padding if tokens compete in it."""
    if isinstance(select, SelectAmong):
        return select.among(router_logits, token_mask)
    return select(router_logits)


def check_top_k(top_k: int, choosable: int | None = None) -> None:
    """Raise ValueError unless 1 <= top_k <= choosable."""
    if top_k < 1:
        raise ValueError(f"top_k={top_k} is below 1; every token needs a slot")
    if choosable is not None and top_k > choosable:
        raise ValueError(
            f"top_k={top_k} exceeds the {choosable} experts that a token can choose from; lower "
            "top_k or raise num_experts"
        )


def check_bias(bias: SelectionBias | None, num_experts: int) -> None:
    """Raise ValueError if the bias is of another number of experts."""
    if bias is not None and bias.e_score_correction_bias.shape[0] != num_experts:
        raise ValueError(
            f"the selection bias has {bias.e_score_correction_bias.shape[0]} experts but the "
            f"router {num_experts}; make it SelectionBias({num_experts})"
        )
