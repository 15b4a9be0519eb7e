"""Rows on their way between tokens and experts, in plain torch.

Axes: T tokens, K slots per token, N = T * K rows, n filled rows, H the width of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_ELEMENTS = 2**17
"""Elements of a piece of rows: with its neighbours in float32 it stays in a cache of 2 MB."""


def widened(rows: Tensor) -> Tensor:
    """Cast to at least float32."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def row_pieces(like: Tensor) -> Iterator[slice]:
    """Slices of the rows of an (n, H) tensor, about PIECE_ELEMENTS each."""
    step = max(PIECE_ELEMENTS // max(like.shape[1], 1), 1)
    for start in range(0, like.shape[0], step):
        yield slice(start, min(start + step, like.shape[0]))


def gather(tokens: Tensor, index: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Gather rows (T, H) -> (n, H) in `dtype`, into `out` if given."""
    if out is None:
        out = tokens.new_empty((index.shape[0], tokens.shape[1]), dtype=dtype)
    return torch.index_select(tokens.to(dtype), 0, index, out=out)


def sum_slots(
    rows: Tensor, inverse: Tensor, num_tokens: int, scale: Tensor | None = None
) -> Tensor:
    """Sum each token's rows in slot order, in float32 (float64 for float64 rows).

    Args:
        rows: (n, H); the slots whose row is n or more are empty.
        inverse: (T * K,), the row of each flat slot.
        num_tokens: T.
        scale: (T * K,), the dtype of rows, a factor for each slot, or None.

    Returns:
        (T, H) in the dtype of rows, rounded once.
    """
    num_slots = inverse.shape[0] // max(num_tokens, 1)
    first = torch.arange(0, num_tokens, device=rows.device) * num_slots
    if rows.shape[0] < inverse.shape[0]:
        filled = inverse < rows.shape[0]
        ends = filled.view(num_tokens, num_slots).sum(1).cumsum(0)
        first = torch.cat([ends.new_zeros(1), ends[:-1]])
        inverse = inverse[filled]
        scale = None if scale is None else scale[filled]
    return torch.embedding_bag(rows, inverse, first, mode=0, per_sample_weights=scale)[0]


def to_slots(values: Tensor, slot: Tensor, like: Tensor) -> Tensor:
    """Put the values of the filled rows (n,) at their slots (T, K) of `like`; others are zero."""
    slots = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    slots.view(-1).index_copy_(0, slot, values.to(like.dtype))
    return slots
