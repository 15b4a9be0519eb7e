"""A tile of rows times a tile of a weight: the loop that every product is made of.

Axes: N rows, E experts, K the summed axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 8
"""Tiles of rows that take turns over the columns together, so that a weight stays in the L2."""


@triton.jit
def place_of(num_tiles, num_columns, GROUP: tl.constexpr):
    """The tile of rows and the block of columns of this program."""
    program = tl.program_id(0)
    wide = GROUP * num_columns
    first = (program // wide) * GROUP
    height = tl.minimum(num_tiles - first, GROUP)
    inside = program % wide
    return first + inside % height, inside // height


@triton.jit
def load_weight(
    w,
    expert,
    first,
    start,
    w_ptrs,
    w_inside,
    left,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """A (COLUMNS, INNER) tile of an expert's weight, by pointers or by TMA."""
    if SOURCE == 1:
        tile = tl.reshape(w.load([expert.to(tl.int32), 0, first, start]), (COLUMNS, INNER))
    elif SOURCE == 2:
        tile = tl.reshape(w.load([expert.to(tl.int32), start, 0, first]), (INNER, COLUMNS))
        tile = tl.trans(tile)
    elif EVEN and EVEN_COLUMNS:
        tile = tl.load(w_ptrs)
    elif EVEN:
        tile = tl.load(w_ptrs, mask=w_inside[:, None], other=0.0)
    else:
        tile = tl.load(w_ptrs, mask=w_inside[:, None] & left, other=0.0)
    return tile


@triton.jit
def product(
    a_ptrs,
    w,
    expert,
    first,
    columns,
    w_inside,
    w_expert,
    w_out,
    w_in,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    SWAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """Sum over K of a tile of rows times a tile of weight rows: (ROWS, COLUMNS) float32.

    a_ptrs (ROWS, 1) point at the first element of each row. The weight is a pointer with strides or
    a descriptor, see `source`; columns (COLUMNS,) are its rows, w_inside says which there are, and
    first is where they begin in their half. EVEN promises that INNER divides K, EVEN_COLUMNS that
    all weight rows are inside.
    """
    inner = tl.arange(0, INNER)[None, :]
    if SWAPPED:
        acc = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    else:
        acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    a_ptrs += inner
    if SOURCE == 0:
        w_ptrs = w + expert * w_expert + columns.to(tl.int64)[:, None] * w_out
        w_ptrs += inner.to(tl.int64) * w_in
    else:
        w_ptrs = inner
    for start in range(0, K, INNER):
        left = inner < K - start
        if EVEN:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=left, other=0.0)
        tile = load_weight(
            w,
            expert,
            first,
            start,
            w_ptrs,
            w_inside,
            left,
            COLUMNS,
            INNER,
            EVEN,
            EVEN_COLUMNS,
            SOURCE,
        )
        if UPCAST:
            a = a.to(tl.float32)
            tile = tile.to(tl.float32)
        if SWAPPED:
            acc = tl.dot(tile, tl.trans(a), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(tile), acc, input_precision="ieee")
        a_ptrs += INNER
        if SOURCE == 0:
            w_ptrs += INNER * w_in
    if SWAPPED:
        acc = tl.trans(acc)
    return acc
