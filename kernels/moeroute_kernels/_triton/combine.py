"""Each token's rows, summed in slot order in float32: no atomics, one rounding.

Axes: T tokens, K slots per token, N = T * K rows, O out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeroute_kernels._triton import config


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    rows_ptr,
    scale_ptr,
    inverse_ptr,
    ends_ptr,
    base_ptr,
    out_ptr,
    T,
    O,
    E,
    slots,
    scaling,
    rows_row,
    HAS_SCALE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = columns < O
    inside = token < T
    if inverse_ptr is None:
        filled = T * slots
    else:
        filled = tl.load(ends_ptr + E - 1)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for slot in range(0, slots):
        at = token * slots + slot
        if inverse_ptr is None:
            row = at
        else:
            row = tl.load(inverse_ptr + at, mask=inside, other=filled)
        full = inside & (row < filled)
        tile = tl.load(
            rows_ptr + row[:, None] * rows_row + columns[None, :],
            mask=full[:, None] & held[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_SCALE:
            tile *= tl.load(scale_ptr + at, mask=full, other=0.0).to(tl.float32)[:, None]
        total += tile
    at = token[:, None] * O + columns[None, :]
    mask = inside[:, None] & held[None, :]
    if HAS_BASE:
        total = tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32) + scaling * total
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine(
    rows: Tensor,
    inverse: Tensor | None,
    ends: Tensor | None,
    num_tokens: int,
    *,
    scale: Tensor | None = None,
    base: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Sum each token's rows: (T, O) in the dtype of rows, or of base.

    Args:
        rows: (N, O) in expert order, last stride 1; from ends[-1] on never read.
        inverse: (N,) int64, the row of each flat slot; None if rows are slots, those of empty slots
            zero.
        ends: (E,) int32, inclusive ends; None without inverse.
        num_tokens: T.
        scale: (T, K) contiguous factors, or None.
        base: (T, O) contiguous; if given, the result is base + scaling * sum.
        scaling: See `base`.
    """
    dtype = rows.dtype if base is None else base.dtype
    out = torch.empty((num_tokens, rows.shape[1]), dtype=dtype, device=rows.device)
    grid = (
        triton.cdiv(num_tokens, config.POINTWISE_ROWS),
        triton.cdiv(rows.shape[1], config.POINTWISE_COLUMNS),
    )
    if not grid[0] * grid[1]:
        return out
    combine_kernel[grid](
        rows,
        scale,
        inverse,
        ends,
        base,
        out,
        num_tokens,
        rows.shape[1],
        0 if ends is None else ends.shape[0],
        rows.shape[0] // num_tokens,
        scaling,
        rows.stride(0),
        HAS_SCALE=scale is not None,
        HAS_BASE=base is not None,
        TOKENS=config.POINTWISE_ROWS,
        COLUMNS=config.POINTWISE_COLUMNS,
    )
    return out


@triton.jit(do_not_specialize=["N"])
def combine_backward_kernel(
    gradient_ptr,
    rows_ptr,
    scale_ptr,
    inverse_ptr,
    ends_ptr,
    rows_gradient_ptr,
    dots_ptr,
    N,
    O,
    E,
    slots,
    gradient_row,
    rows_row,
    WANT_ROWS: tl.constexpr,
    WANT_DOTS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Slot by slot: the gradient of its row, and its dot product with it."""
    slot = (tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)).to(tl.int64)
    inside = slot < N
    filled = tl.load(ends_ptr + E - 1)
    row = tl.load(inverse_ptr + slot, mask=inside, other=0)
    full = inside & (row < filled)
    scale = tl.load(scale_ptr + slot, mask=full, other=0.0).to(tl.float32)[:, None]
    dots = tl.zeros((SLOTS,), dtype=tl.float32)
    for start in range(0, O, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        held = (columns < O)[None, :]
        mask = full[:, None] & held
        source = (slot // slots)[:, None] * gradient_row + columns[None, :]
        gradient = tl.load(gradient_ptr + source, mask=mask, other=0.0).to(tl.float32)
        at = row[:, None] * rows_row + columns[None, :]
        if WANT_DOTS:
            value = tl.load(rows_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dots += tl.sum(gradient * value, 1)
        if WANT_ROWS:
            share = (gradient * scale).to(rows_gradient_ptr.dtype.element_ty)
            out = row[:, None] * O + columns[None, :]
            tl.store(rows_gradient_ptr + out, share, mask=inside[:, None] & held)
    if WANT_DOTS:
        tl.store(dots_ptr + slot, dots.to(dots_ptr.dtype.element_ty), mask=inside)


def combine_backward(
    gradient: Tensor,
    rows: Tensor,
    routing_weights: Tensor,
    inverse: Tensor,
    ends: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of rows and routing_weights, those that `needs` asks for.

    Args:
        gradient: (T, O), last stride 1.
        rows: (N, O), last stride 1.
        routing_weights: (T, K), contiguous.
        inverse: (N,) int64.
        ends: (E,) int32.
        needs: For rows and for routing_weights.
    """
    num_rows, outs = rows.shape
    want_rows, want_dots = needs
    rows_gradient = rows.new_empty((num_rows if want_rows else 0, outs))
    dots = torch.empty(
        routing_weights.shape if want_dots else (0,),
        dtype=routing_weights.dtype,
        device=rows.device,
    )
    if num_rows:
        combine_backward_kernel[(triton.cdiv(num_rows, config.POINTWISE_ROWS),)](
            gradient,
            rows,
            routing_weights,
            inverse,
            ends,
            rows_gradient,
            dots,
            num_rows,
            outs,
            ends.shape[0],
            routing_weights.shape[1],
            gradient.stride(0),
            rows.stride(0),
            WANT_ROWS=want_rows,
            WANT_DOTS=want_dots,
            SLOTS=config.POINTWISE_ROWS,
            COLUMNS=config.POINTWISE_COLUMNS,
        )
    return [result for result, need in zip((rows_gradient, dots), needs, strict=True) if need]
