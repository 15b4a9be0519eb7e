"""The first half of the routed MLP: gather, product, activation, routing weight, in one kernel.

Reads the concatenated or interleaved weight as it lies in a checkpoint: one tile of columns holds a
gate half and the up half that belongs to it, made by one product and split in registers.

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
from moeroute_kernels._triton.glu import activate
from moeroute_kernels._triton.product import GROUP, place_of, product
from moeroute_kernels._triton.source import comes_whole, weight_source
from moeroute_kernels._triton.tiles import TileMap, slots_of, tile_expert, tile_rows
from moeroute_kernels._triton.tuning import launch


@triton.jit
def split_columns(block, I, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of the activated tile, and where gate and up stand in the wide tile.

    Returns the wide columns (COLUMNS,) and whether each is one, and the narrow ones likewise.
    """
    if GATED:
        half: tl.constexpr = COLUMNS // 2
        narrow = block * half + tl.arange(0, half)
        position = tl.arange(0, COLUMNS)
        if INTERLEAVED:
            wide = block * COLUMNS + position
            wide_inside = wide < 2 * I
        else:
            within = block * half + position % half
            wide = within + (position // half) * I
            wide_inside = within < I
    else:
        narrow = block * COLUMNS + tl.arange(0, COLUMNS)
        wide = narrow
        wide_inside = narrow < I
    return wide, wide_inside, narrow, narrow < I


@triton.jit
def split_tile(tile, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Split a (ROWS, 2 * HALF) tile into gate and up."""
    if INTERLEAVED:
        return tl.split(tl.reshape(tile, (ROWS, HALF, 2)))
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit(do_not_specialize=["N", "num_tiles"])
def mlp_up_kernel(
    x_ptr,
    order_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    pre_ptr,
    out_ptr,
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
    x_row,
    w_expert,
    w_out,
    w_in,
    bias_expert,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPED: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
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
    if (expert < 0) | (expert == E):
        return
    rows, inside = tile_rows(starts_ptr, ends_ptr, tile, expert, E, N, ROWS)
    slot = slots_of(order_ptr, rows)
    wide, wide_inside, narrow, narrow_inside = split_columns(block, I, GATED, INTERLEAVED, COLUMNS)
    acc = product(
        x_ptr + (slot // slots)[:, None] * x_row,
        w_ptr,
        expert,
        block * (COLUMNS // 2 if GATED and not INTERLEAVED else COLUMNS),
        wide,
        wide_inside,
        w_expert,
        w_out,
        w_in,
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
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * bias_expert + wide, mask=wide_inside, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    pre = acc.to(out_ptr.dtype.element_ty)
    if KEEP:
        width = 2 * I if GATED else I
        pre_ptrs = pre_ptr + rows[:, None] * width + wide[None, :]
        tl.store(pre_ptrs, pre, mask=inside[:, None] & wide_inside[None, :])
    # the activation sees what backward will see
    acc = pre.to(tl.float32)
    if GATED:
        gate, up = split_tile(acc, INTERLEAVED, ROWS, COLUMNS // 2)
    else:
        gate = acc
        up = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    scale = tl.load(scale_ptr + slot).to(tl.float32)
    value = activate(gate, up, alpha, limit, NAME, CLAMPED, SHIFT) * scale[:, None]
    out_ptrs = out_ptr + rows[:, None] * I + narrow[None, :]
    mask = inside[:, None] & narrow_inside[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=mask)


def mlp_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing_weights: Tensor,
    order: Tensor | None,
    tiles: TileMap,
    form: DeviceForm,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Compute pre = x[token] @ weight[expert].T + bias and act(pre) * routing weight.

    Args:
        x: (T, H), last stride 1.
        weight: (E, 2I or I, H), any strides.
        bias: (E, 2I or I), last stride 1, or None.
        routing_weights: (T, K), contiguous.
        order: (N,) int64, the flat slot of each row; None if rows are slots.
        tiles: Which rows are whose.
        form: The activation.
        keep: Store the pre-activation.

    Returns:
        The pre-activation (N, 2I or I), (0, ...) unless kept, and the weighted activated rows (N,
        I); rows in no tile are not written.
    """
    num_experts, width, hidden = weight.shape
    num_rows, slots = routing_weights.numel(), routing_weights.shape[1]
    inner = width // 2 if form.gated else width
    pre = torch.empty((num_rows if keep else 0, width), dtype=x.dtype, device=x.device)
    out = torch.empty((num_rows, inner), dtype=x.dtype, device=x.device)
    num_tiles = tiles.experts.shape[0]
    halves = 2 if form.gated and not form.interleaved else 1

    def run(layout: Tiles) -> None:
        num_columns = triton.cdiv(width, layout.columns)
        weight_or_boxes, source = weight_source(weight, layout, halves)
        mlp_up_kernel[(num_tiles * num_columns,)](
            x,
            order,
            weight_or_boxes,
            bias,
            routing_weights,
            pre,
            out,
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
            x.stride(0),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            **form.constants(),
            INTERLEAVED=form.interleaved,
            HAS_BIAS=bias is not None,
            KEEP=keep,
            ROWS=tiles.block_rows,
            COLUMNS=layout.columns,
            INNER=layout.inner,
            EVEN=hidden % layout.inner == 0,
            EVEN_COLUMNS=width % layout.columns == 0,
            SWAPPED=layout.swapped,
            UPCAST=config.upcast(x.dtype),
            SOURCE=source,
            GROUP=GROUP,
            num_warps=layout.warps,
            num_stages=layout.stages,
        )

    if num_tiles * width:
        # without a gate, the registers hold twice the activations: some of them spill
        wide = not keep and form.gated and comes_whole(weight)
        kind = "inference up" if wide else "up"
        launch(config.product_row(kind, num_rows, num_experts, x.dtype), run)
    return pre, out
