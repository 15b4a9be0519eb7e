"""Gradients of weights and biases: sums over each expert's own rows, in row order.

An expert without rows stores zeros. Axes: N rows, E experts, I in, O out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeroute_kernels._triton import config
from moeroute_kernels._triton.config import Tiles
from moeroute_kernels._triton.tuning import launch

SUM_ROWS = 64
SUM_COLUMNS = 128
RANK_BLOCK = 32
RANK_STEP = 256


@triton.jit
def expert_range(ends_ptr, expert):
    """First and last row (exclusive) of an expert."""
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    return start, tl.load(ends_ptr + expert)


@triton.jit
def longest_first_kernel(ends_ptr, turns_ptr, E, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Each expert's place is the number of experts that come before it; of equals, the lower id."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = mine < E
    rows = rows_of(ends_ptr, mine, inside)
    place = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, E, STEP):
        other = first + tl.arange(0, STEP)
        others = rows_of(ends_ptr, other, other < E)[None, :]
        earlier = (others == rows[:, None]) & (other[None, :] < mine[:, None])
        before = ((others > rows[:, None]) | earlier) & (other < E)[None, :]
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(turns_ptr + place, mine, mask=inside)


@triton.jit
def rows_of(ends_ptr, experts, inside):
    """How many rows each expert has."""
    start = tl.load(ends_ptr + experts - 1, mask=inside & (experts > 0), other=0)
    return tl.load(ends_ptr + experts, mask=inside, other=0) - start


def longest_first(ends: Tensor) -> Tensor:
    """The experts by their number of rows, longest first, in one launch: (E,) int32.

    A long expert that starts last leaves the device waiting for it; one that starts first has the
    others for company.

    Args:
        ends: (E,) int32, inclusive ends.
    """
    turns = torch.empty_like(ends)
    num_experts = ends.shape[0]
    if num_experts:
        grid = (triton.cdiv(num_experts, RANK_BLOCK),)
        longest_first_kernel[grid](ends, turns, num_experts, RANK_BLOCK, RANK_STEP)
    return turns


@triton.jit
def load_rows(ptr, index_ptr, rows, inside, slots, stride, columns, held, GATHER: tl.constexpr):
    """A (ROWS, COLUMNS) tile of rows that may be gathered; zero outside."""
    source = rows.to(tl.int64)
    if GATHER:
        source = tl.load(index_ptr + rows, mask=inside, other=0) // slots
    at = source[:, None] * stride + columns[None, :]
    return tl.load(ptr + at, mask=inside[:, None] & held[None, :], other=0.0)


@triton.jit
def mm_weights_kernel(
    left_ptr,
    right_ptr,
    index_ptr,
    out_ptr,
    ends_ptr,
    turns_ptr,
    O,
    I,
    slots,
    left_row,
    right_row,
    out_expert,
    out_out,
    out_in,
    LEFT_GATHER: tl.constexpr,
    RIGHT_GATHER: tl.constexpr,
    OUT_TILE: tl.constexpr,
    IN_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    in_blocks = tl.cdiv(I, IN_TILE)
    expert = tl.load(turns_ptr + tl.program_id(1)).to(tl.int64)
    block = tl.program_id(0)
    outs = (block // in_blocks) * OUT_TILE + tl.arange(0, OUT_TILE)
    ins = (block % in_blocks) * IN_TILE + tl.arange(0, IN_TILE)
    start, end = expert_range(ends_ptr, expert)
    acc = tl.zeros((OUT_TILE, IN_TILE), dtype=tl.float32)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < end
        left = load_rows(
            left_ptr, index_ptr, rows, inside, slots, left_row, outs, outs < O, LEFT_GATHER
        )
        right = load_rows(
            right_ptr, index_ptr, rows, inside, slots, right_row, ins, ins < I, RIGHT_GATHER
        )
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    at = expert * out_expert + outs.to(tl.int64)[:, None] * out_out
    at += ins.to(tl.int64)[None, :] * out_in
    mask = (outs < O)[:, None] & (ins < I)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def mm_weights(
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    turns: Tensor,
    out: Tensor,
    *,
    index: Tensor | None = None,
    slots: int = 1,
    gather: str = "",
) -> Tensor:
    """Sum left[r] x right[r] over each expert's rows into `out`.

    Args:
        left: (N, O), or (T, O) if gathered; last stride 1.
        right: (N, I), or (T, I) if gathered, the dtype of left; last stride 1.
        ends: (E,) int32, inclusive ends.
        turns: (E,) int32, the experts in the order in which they start; see `longest_first`.
        out: (E, O, I), any strides that do not overlap.
        index: (N,) int64; a gathered row r is index[r] // slots.
        slots: See `index`.
        gather: "left", "right" or nothing.

    Returns:
        `out`.
    """
    num_experts, outs, ins = out.shape

    def run(layout: Tiles) -> None:
        blocks = triton.cdiv(outs, layout.rows) * triton.cdiv(ins, layout.columns)
        mm_weights_kernel[(blocks, num_experts)](
            left,
            right,
            index,
            out,
            ends,
            turns,
            outs,
            ins,
            slots,
            left.stride(0),
            right.stride(0),
            *out.stride(),
            LEFT_GATHER=gather == "left",
            RIGHT_GATHER=gather == "right",
            OUT_TILE=layout.rows,
            IN_TILE=layout.columns,
            ROWS=layout.inner,
            UPCAST=config.upcast(left.dtype),
            num_warps=layout.warps,
            num_stages=layout.stages,
        )

    if out.numel():
        launch(config.weights_row(left.dtype, gathered=bool(gather)), run)
    return out


@triton.jit
def sum_rows_kernel(
    rows_ptr,
    index_ptr,
    scale_ptr,
    out_ptr,
    ends_ptr,
    O,
    slots,
    rows_row,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    held = columns < O
    start, end = expert_range(ends_ptr, expert)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < end
        tile = load_rows(rows_ptr, index_ptr, rows, inside, slots, rows_row, columns, held, GATHER)
        tile = tile.to(tl.float32)
        if GATHER:
            slot = tl.load(index_ptr + rows, mask=inside, other=0)
            tile *= tl.load(scale_ptr + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(tile, 0)
    tl.store(out_ptr + expert * O + columns, total.to(out_ptr.dtype.element_ty), mask=held)


def sum_rows(
    rows: Tensor,
    ends: Tensor,
    like: Tensor,
    *,
    index: Tensor | None = None,
    slots: int = 1,
    scale: Tensor | None = None,
) -> Tensor:
    """Sum each expert's rows: (E, O) in the dtype of `like`.

    Args:
        rows: (N, O) in expert order, or (T, O) with `index`; last stride 1.
        ends: (E,) int32, inclusive ends.
        like: (E, O).
        index: (N,) int64; row r is scale[index[r]] * rows[index[r] // slots].
        slots: See `index`.
        scale: (T * K,) factors by flat slot; needed with index.
    """
    num_experts, outs = like.shape
    out = torch.empty((num_experts, outs), dtype=like.dtype, device=like.device)
    blocks = triton.cdiv(outs, SUM_COLUMNS)
    if blocks * num_experts:
        sum_rows_kernel[(blocks, num_experts)](
            rows,
            index,
            scale,
            out,
            ends,
            outs,
            slots,
            rows.stride(0),
            GATHER=index is not None,
            ROWS=SUM_ROWS,
            COLUMNS=SUM_COLUMNS,
        )
    return out
