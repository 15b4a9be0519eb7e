"""Who comes first at an expert, where not all can be taken.

Axes: N slots, T tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def places_in_queue(ids: Tensor, size: int, priority: Tensor | None = None) -> Tensor:
    """Each slot's place in the queue of its expert, from 0.

    Args:
        ids: (N,) int64 in [0, size]; `size` is an empty slot, which has a queue of its own.
        size: E.
        priority: (N,) higher comes first, the earlier slot among equals; None: in order of slots.

    Returns:
        (N,) int64; no gradient, no host synchronisation.
    """
    first = torch.arange(ids.shape[0], device=ids.device)
    if priority is not None:
        first = torch.argsort(priority.detach(), descending=True, stable=True)
    order = first[torch.argsort(ids[first], stable=True)]  # by expert, then by who comes first
    counts = torch.zeros(size + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, ids, torch.ones_like(ids))
    starts = counts.cumsum(0) - counts
    places = torch.arange(ids.shape[0], device=ids.device) - starts[ids[order]]
    return torch.empty_like(ids).scatter(0, order, places)


def places_in_columns(wishes: Tensor, token_mask: Tensor | None) -> Tensor:
    """Each token's place in each expert's order, the highest wish first.

    Args:
        wishes: (T, E), above -1.
        token_mask: (T,) bool, False marks padding, which comes last.

    Returns:
        (T, E) int64; no gradient.
    """
    wishes = wishes.detach()
    if token_mask is not None:
        wishes = wishes.masked_fill(~token_mask.to(torch.bool).unsqueeze(1), -1.0)
    order = torch.argsort(wishes, dim=0, descending=True, stable=True)
    rows = torch.arange(wishes.shape[0], device=wishes.device).unsqueeze(1)
    return torch.empty_like(order).scatter(0, order, rows.expand_as(order))


def rows_allowed(num_tokens: int, share: float, token_mask: Tensor | None) -> Tensor | int:
    """ceil(real tokens * share), as a number where there is no mask and a tensor where there is.

    Args:
        num_tokens: T.
        share: Rows a real token.
        token_mask: (T,) bool, False marks padding.
    """
    slack = 1e-6  # shares such as 1.1 * 2 / 8 are no round numbers
    if token_mask is None:
        return math.ceil(num_tokens * share - slack)
    real = token_mask.to(torch.bool).sum()
    return torch.ceil(real.double() * share - slack).to(torch.int64)
