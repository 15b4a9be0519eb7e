"""Backward of the routed MLP in the width of the experts, in one kernel.

From the gathered output gradient g of a row, its pre-activation and its routing weight w:

    inner = down^T g       a = act(pre)       dots = inner . a (+ g . down_bias)
    activated = w a        dpre = act'(w inner)

Axes: T tokens, K slots per token, N rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeroute_kernels._triton import config
from moeroute_kernels._triton.config import Tiles
from moeroute_kernels._triton.form import DeviceForm
from moeroute_kernels._triton.glu import activate_backward
from moeroute_kernels._triton.mlp_up import split_tile
from moeroute_kernels._triton.product import GROUP, place_of, product
from moeroute_kernels._triton.source import weight_source
from moeroute_kernels._triton.tiles import TileMap, tile_rows
from moeroute_kernels._triton.tuning import launch


# the partial sums are the last row of many: how it is aligned depends on N
@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["dots_ptr"])
def bias_dots_kernel(
    g_ptr,
    order_ptr,
    bias_ptr,
    dots_ptr,
    experts_ptr,
    starts_ptr,
    ends_ptr,
    N,
    E,
    H,
    slots,
    g_row,
    bias_expert,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Each row's dot product with the bias of its expert."""
    tile = tl.program_id(0)
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    rows, inside = tile_rows(starts_ptr, ends_ptr, tile, expert, E, N, ROWS)
    slot = tl.load(order_ptr + rows)
    g_ptrs = g_ptr + (slot // slots)[:, None] * g_row
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, H, INNER):
        inner = start + tl.arange(0, INNER)
        held = inner < H
        row = tl.load(g_ptrs + inner[None, :], mask=held[None, :], other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + expert * bias_expert + inner, mask=held, other=0.0)
        total += tl.sum(row * bias.to(tl.float32)[None, :], 1)
    tl.store(dots_ptr + slot, total, mask=inside)


@triton.jit(do_not_specialize=["N", "num_tiles"])
def mlp_inner_kernel(
    g_ptr,
    order_ptr,
    w_ptr,
    scale_ptr,
    pre_ptr,
    activated_ptr,
    dpre_ptr,
    dots_ptr,
    experts_ptr,
    starts_ptr,
    ends_ptr,
    N,
    E,
    I,
    H,
    num_tiles,
    num_columns,
    slots,
    alpha,
    limit,
    g_row,
    w_expert,
    w_hidden,
    w_inner,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPED: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WANT_ACTIVATED: tl.constexpr,
    WANT_PRE: tl.constexpr,
    WANT_DOTS: tl.constexpr,
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
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    rows, inside = tile_rows(starts_ptr, ends_ptr, tile, expert, E, N, ROWS)
    slot = tl.load(order_ptr + rows)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    held = columns < I
    gradient = product(
        g_ptr + (slot // slots)[:, None] * g_row,
        w_ptr,
        expert,
        block * COLUMNS,
        columns,
        held,
        w_expert,
        w_inner,
        w_hidden,
        H,
        ROWS,
        COLUMNS,
        INNER,
        EVEN,
        EVEN_COLUMNS,
        SWAPPED,
        UPCAST,
        SOURCE,
    )
    mask = inside[:, None] & held[None, :]
    width = 2 * I if GATED else I
    at = rows[:, None] * width + columns[None, :]
    if INTERLEAVED:
        wide = 2 * block * COLUMNS + tl.arange(0, 2 * COLUMNS)
        pair_at = rows[:, None] * width + wide[None, :]
        pair_mask = inside[:, None] & (wide < width)[None, :]
        pair = tl.load(pre_ptr + pair_at, mask=pair_mask, other=0.0).to(tl.float32)
        gate, up = split_tile(pair, True, ROWS, COLUMNS)
    else:
        gate = tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(pre_ptr + at + I, mask=mask, other=0.0).to(tl.float32)
        else:
            up = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    scale = tl.load(scale_ptr + slot).to(tl.float32)[:, None]
    activated, gate_gradient, up_gradient = activate_backward(
        gradient * scale, gate, up, alpha, limit, NAME, CLAMPED, SHIFT
    )
    dtype = pre_ptr.dtype.element_ty
    if WANT_ACTIVATED:
        narrow_at = rows[:, None] * I + columns[None, :]
        tl.store(activated_ptr + narrow_at, (activated * scale).to(dtype), mask=mask)
    if WANT_PRE:
        if INTERLEAVED:
            pair = tl.reshape(tl.join(gate_gradient, up_gradient), (ROWS, 2 * COLUMNS))
            tl.store(dpre_ptr + pair_at, pair.to(dtype), mask=pair_mask)
        else:
            tl.store(dpre_ptr + at, gate_gradient.to(dtype), mask=mask)
            if GATED:
                tl.store(dpre_ptr + at + I, up_gradient.to(dtype), mask=mask)
    if WANT_DOTS:
        dots = tl.sum(tl.where(mask, gradient * activated, 0.0), 1)
        tl.store(dots_ptr + block.to(tl.int64) * N + slot, dots, mask=inside)


def mlp_inner(
    gradient: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing_weights: Tensor,
    pre: Tensor,
    order: Tensor,
    tiles: TileMap,
    form: DeviceForm,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute activated, dpre and dots.

    Args:
        gradient: (T, H), last stride 1.
        weight: (E, H, I), any strides.
        bias: (E, H), last stride 1, or None.
        routing_weights: (T, K), contiguous.
        pre: (N, 2I or I), contiguous.
        order: (N,) int64, the flat slot of each row.
        tiles: Which rows are whose.
        form: The activation.
        wants: Which of the three results are wanted.

    Returns:
        activated (N, I) and dpre (N, 2I or I), whose rows in no tile are not written, and dots
        (T, K) float32, zero for an empty slot; empty where not wanted.
    """
    num_experts, hidden, inner = weight.shape
    (num_rows, width), slots = pre.shape, routing_weights.shape[1]
    want_activated, want_pre, want_dots = wants
    num_tiles = tiles.experts.shape[0]
    with_bias = bias is not None and want_dots
    activated = pre.new_empty((num_rows if want_activated else 0, inner))
    dpre = pre.new_empty((num_rows if want_pre else 0, width))

    def run(layout: Tiles) -> Tensor:
        """Fill activated and dpre; return dots, a partial sum per block of columns."""
        num_columns = triton.cdiv(inner, layout.columns)
        parts = (num_columns + with_bias, num_rows) if want_dots else (0, 0)
        dots = torch.zeros(parts, dtype=torch.float32, device=pre.device)
        weight_or_boxes, source = weight_source(weight.transpose(1, 2), layout)
        mlp_inner_kernel[(num_tiles * num_columns,)](
            gradient,
            order,
            weight_or_boxes,
            routing_weights,
            pre,
            activated,
            dpre,
            dots,
            tiles.experts,
            tiles.starts,
            tiles.ends,
            num_rows,
            num_experts,
            inner,
            hidden,
            num_tiles,
            num_columns,
            slots,
            form.alpha,
            form.limit,
            gradient.stride(0),
            *weight.stride(),
            **form.constants(),
            INTERLEAVED=form.interleaved,
            WANT_ACTIVATED=want_activated,
            WANT_PRE=want_pre,
            WANT_DOTS=want_dots,
            ROWS=tiles.block_rows,
            COLUMNS=layout.columns,
            INNER=layout.inner,
            EVEN=hidden % layout.inner == 0,
            EVEN_COLUMNS=inner % layout.columns == 0,
            SWAPPED=layout.swapped,
            UPCAST=config.upcast(pre.dtype),
            SOURCE=source,
            GROUP=GROUP,
            num_warps=layout.warps,
            num_stages=layout.stages,
        )
        if with_bias:
            bias_dots_kernel[(num_tiles,)](
                gradient,
                order,
                bias,
                dots[num_columns],
                tiles.experts,
                tiles.starts,
                tiles.ends,
                num_rows,
                num_experts,
                hidden,
                slots,
                gradient.stride(0),
                bias.stride(0),
                ROWS=tiles.block_rows,
                INNER=config.POINTWISE_COLUMNS,
            )
        return dots

    kind = "interleaved inner" if form.interleaved else "inner"
    if num_tiles * inner:
        dots = launch(config.product_row(kind, num_rows, num_experts, pre.dtype), run)
        dots = dots.sum(0)  # in the order of the blocks
    else:
        dots = torch.zeros((num_rows * want_dots,), dtype=torch.float32, device=pre.device)
    return activated, dpre, dots.view(routing_weights.shape) if want_dots else dots
