"""Rows of each expert times its own weight.

Rows may be gathered while they are loaded, and the weight has any strides, so that a checkpoint of
either layout, and its transpose in backward, is read as it lies.

Axes: N rows, E experts, I in, O out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeroute_kernels._triton import config
from moeroute_kernels._triton.config import Tiles
from moeroute_kernels._triton.product import GROUP, place_of, product
from moeroute_kernels._triton.source import weight_source
from moeroute_kernels._triton.tiles import TileMap, slots_of, tile_expert, tile_map, tile_rows
from moeroute_kernels._triton.tuning import launch


@triton.jit(do_not_specialize=["N", "num_tiles"])
def mm_rows_kernel(
    a_ptr,
    index_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    experts_ptr,
    starts_ptr,
    ends_ptr,
    N,
    E,
    O,
    K,
    num_tiles,
    num_columns,
    slots,
    a_row,
    w_expert,
    w_out,
    w_in,
    bias_expert,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    SWAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
    SOURCE: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile, block = place_of(num_tiles, num_columns, GROUP)
    expert = tile_expert(experts_ptr, starts_ptr, tile, E)
    if expert < 0:
        return
    rows, inside = tile_rows(starts_ptr, ends_ptr, tile, expert, E, N, ROWS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (columns < O)[None, :]
    out_ptrs = out_ptr + rows[:, None] * O + columns[None, :]
    if expert == E:
        tl.store(out_ptrs, tl.zeros((ROWS, COLUMNS), dtype=out_ptr.dtype.element_ty), mask=mask)
        return
    source = rows
    if GATHER:
        source = slots_of(index_ptr, rows) // slots
    acc = product(
        a_ptr + source[:, None] * a_row,
        w_ptr,
        expert,
        block * COLUMNS,
        columns,
        columns < O,
        w_expert,
        w_out,
        w_in,
        K,
        ROWS,
        COLUMNS,
        INNER,
        EVEN,
        EVEN_COLUMNS,
        SWAPPED,
        UPCAST,
        SOURCE,
    )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * bias_expert + columns, mask=columns < O, other=0.0)
        bias = bias.to(tl.float32)[None, :]
        if HAS_SCALE:
            scale = tl.load(scale_ptr + slots_of(index_ptr, rows)).to(tl.float32)
            bias = bias * scale[:, None]
        acc += bias
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def mm_rows(
    rows: Tensor,
    weight: Tensor,
    tiles: TileMap,
    *,
    num_rows: int,
    index: Tensor | None = None,
    slots: int = 1,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    order: Tensor | None = None,
    out: Tensor | None = None,
    kind: str = "rows",
) -> Tensor:
    """Compute rows @ weight[expert].T (+ scale * bias[expert]).

    Args:
        rows: (N, I) in expert order, or (T, I) with `index`; the last stride must be 1.
        weight: (E, O, I), any strides, the dtype of rows.
        tiles: Which rows are whose; rows in no tile are not written.
        num_rows: N.
        index: (N,) int64; the source of row r is rows[index[r] // slots].
        slots: See `index`.
        bias: (E, O), contiguous in O, or None.
        scale: (N,) factors of the bias, by flat slot, or None.
        order: (N,) int64, the flat slot of each row, read with scale; None if rows are slots.
        out: (N, O) contiguous, to write into.
        kind: Key of `config.TABLE`.

    Returns:
        (N, O) in the dtype of rows.
    """
    num_experts, outs, ins = weight.shape
    if out is None:
        out = torch.empty((num_rows, outs), dtype=rows.dtype, device=rows.device)
    num_tiles = tiles.experts.shape[0]
    slot_of_row = index if index is not None else order

    def run(layout: Tiles) -> None:
        num_columns = triton.cdiv(outs, layout.columns)
        weight_or_boxes, source = weight_source(weight, layout)
        mm_rows_kernel[(num_tiles * num_columns,)](
            rows,
            slot_of_row,
            weight_or_boxes,
            bias,
            scale,
            out,
            tiles.experts,
            tiles.starts,
            tiles.ends,
            num_rows,
            num_experts,
            outs,
            ins,
            num_tiles,
            num_columns,
            slots,
            rows.stride(0),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            GATHER=index is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            ROWS=tiles.block_rows,
            COLUMNS=layout.columns,
            INNER=layout.inner,
            EVEN=ins % layout.inner == 0,
            EVEN_COLUMNS=outs % layout.columns == 0,
            SWAPPED=layout.swapped,
            UPCAST=config.upcast(rows.dtype),
            SOURCE=source,
            GROUP=GROUP,
            num_warps=layout.warps,
            num_stages=layout.stages,
        )

    if num_tiles * outs:
        launch(config.product_row(kind, num_rows, num_experts, rows.dtype), run)
    return out


def tiles_for(ends: Tensor, num_rows: int, dtype: torch.dtype, *, tail: bool = False) -> TileMap:
    """The tile map that every product of these rows shares."""
    block_rows = config.block_rows(num_rows, ends.shape[0], dtype)
    return tile_map(ends, num_rows, block_rows, tail=tail)
