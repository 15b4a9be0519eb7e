"""Subsets of experts as draws without replacement, and how likely a draw was.

Axes: T rows, K drawn in order, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_subsets(logits: Tensor, size: int) -> Tensor:
    """Draw experts one after the other, each by the softmax over those not drawn yet.

    The highest of logits plus Gumbel noise are such a draw. The noise is torch's own, so that
    activation checkpointing, which puts torch's generator back, draws the same subset again.

    Args:
        logits: (T, E) float32 or wider.
        size: K, at most E.

    Returns:
        (T, K) int64, in the order of drawing; no gradient.
    """
    logits = logits.detach()
    waits = torch.empty_like(logits).exponential_().clamp(min=torch.finfo(logits.dtype).tiny)
    return torch.topk(logits - waits.log(), size, dim=-1).indices


def subset_log_prob(logits: Tensor, drawn: Tensor) -> Tensor:
    """Log-probability of draws without replacement, in their order.

        log Q(i) = sum_j logits[i_j] - logsumexp(logits of all but i_1 .. i_{j-1})

    Source: The Analysis of Permutations, Plackett, 1975. Each logsumexp runs over what remains, so
    that nothing is lost where the drawn have almost all the probability.

    Args:
        logits: (T, E) float32 or wider.
        drawn: (T, K) int64, no id twice in a row.

    Returns:
        (T,) in the dtype of logits, at most 0; differentiable in logits.
    """
    one_hot = torch.zeros_like(logits, dtype=torch.int64).unsqueeze(1)  # (T, 1, E)
    one_hot = one_hot.expand(-1, drawn.shape[1], -1).scatter(2, drawn.unsqueeze(2), 1)
    taken = (one_hot.cumsum(1) - one_hot).to(torch.bool)  # before the j-th draw
    remaining = logits.unsqueeze(1).masked_fill(taken, float("-inf")).logsumexp(-1)  # (T, K)
    return (logits.gather(1, drawn) - remaining).sum(1)
