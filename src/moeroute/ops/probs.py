"""Logits to probabilities: the functions that selections and losses are made of.

Each takes (T, E) router logits and answers in their shape and dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TINY = 1e-20


def softmax_probs(router_logits: Tensor) -> Tensor:
    """Softmax over experts: rows sum to 1."""
    return torch.softmax(router_logits, dim=-1)


def raw_logits(router_logits: Tensor) -> Tensor:
    """The logits as they are: what a router says that weighs freely, below 0 as well."""
    return router_logits


def sigmoid_probs(router_logits: Tensor) -> Tensor:
    """Sigmoid of each expert's logit by itself: in (0, 1), rows sum to anything."""
    return torch.sigmoid(router_logits)


def sqrt_softplus_probs(router_logits: Tensor) -> Tensor:
    """sqrt(softplus(logit)) of each expert by itself: above 0, without a bound (DeepSeek-V4).

    A logit so low that its softplus is 0 in its dtype gives 0 without a gradient.
    """
    grown = functional.softplus(router_logits)
    safe = torch.where(grown == 0, 1.0, grown).sqrt()  # the root of 0 has an infinite gradient
    return torch.where(grown == 0, 0.0, safe)


def normalized_sigmoid_probs(router_logits: Tensor) -> Tensor:
    """Sigmoid divided by its row's sum: rows sum to 1; for losses over sigmoid routers."""
    probs = torch.sigmoid(router_logits)
    return probs / (probs.sum(dim=-1, keepdim=True) + TINY)


def normalized_sqrt_softplus_probs(router_logits: Tensor) -> Tensor:
    """`sqrt_softplus_probs` divided by its row's sum: rows sum to 1, for losses."""
    probs = sqrt_softplus_probs(router_logits)
    return probs / (probs.sum(dim=-1, keepdim=True) + TINY)


@dataclass(frozen=True, slots=True)
class SoftmaxAt:
    """Softmax of the logits divided by a temperature: the colder, the nearer to one expert alone.

    Args:
        temperature: Above 0.
    """

    temperature: float

    def __call__(self, router_logits: Tensor) -> Tensor:
        """Rows sum to 1."""
        return torch.softmax(router_logits / self.temperature, dim=-1)
