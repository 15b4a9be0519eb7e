"""Logits to probabilities: the functions that selections are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_probs(router_logits: Tensor) -> Tensor:
    """Softmax over experts: (T, E) -> (T, E), rows sum to 1."""
    return torch.softmax(router_logits, dim=-1)


def sigmoid_probs(router_logits: Tensor) -> Tensor:
    """Sigmoid of each expert's logit by itself: (T, E) -> (T, E) in (0, 1)."""
    return torch.sigmoid(router_logits)


def normalized_sigmoid_probs(router_logits: Tensor) -> Tensor:
    """Sigmoid divided by its row sum: (T, E) -> (T, E), for losses over sigmoid routers."""
    probs = torch.sigmoid(router_logits)
    return probs / probs.sum(dim=-1, keepdim=True).clamp(min=1e-20)
