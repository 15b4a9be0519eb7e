"""The sorted form of `gated_lora` on the device: every expert over its own tokens.

Axes: T tokens, K slots, N = T * K rows, E experts, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeroute_kernels._triton import config
from moeroute_kernels._triton.combine import combine
from moeroute_kernels._triton.routed_mlp import row_major
from moeroute_kernels._triton.rows import mm_rows
from moeroute_kernels._triton.sort import sort_and_tile
from moeroute_kernels._triton.weights import longest_first, mm_weights


def forward(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Two products per expert, over its tokens; see `moeroute_kernels.lora_sorted.forward`."""
    lora_a, lora_b, x = lora_a.to(dtype), lora_b.to(dtype), row_major(x.to(dtype))
    num_rows, experts = ids.numel(), lora_a.shape[0]
    block_rows = config.block_rows(num_rows, experts, dtype)
    order, inverse, ends, tiles = sort_and_tile(ids, experts, block_rows)
    middle = mm_rows(x, lora_a, tiles, num_rows=num_rows, index=order, slots=ids.shape[1])
    rows = mm_rows(middle, lora_b.permute(1, 0, 2), tiles, num_rows=num_rows)
    out = combine(
        rows,
        inverse,
        ends,
        x.shape[0],
        scale=weights.contiguous(),
        base=base.contiguous(),
        scaling=scaling,
    )
    return out, middle, order


def backward(
    gradient: Tensor,
    x: Tensor,
    middle: Tensor,
    order: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, lora_a, lora_b and weights; see `moeroute_kernels.lora_sorted.backward`."""
    need_x, need_a, need_b, need_weights = needs
    (experts, rank, ins), outs = lora_a.shape, lora_b.shape[0]
    num_rows, slots, dtype = order.shape[0], ids.shape[1], lora_a.dtype
    block_rows = config.block_rows(num_rows, experts, dtype)
    _, inverse, ends, tiles = sort_and_tile(ids, experts, block_rows)
    gradient = row_major(gradient.to(dtype))
    gates = weights.reshape(-1).index_select(0, order).float().mul_(scaling).unsqueeze(1)
    turns = longest_first(ends)
    where = {"index": order, "slots": slots}
    grad_x = grad_a = grad_b = grad_weights = None
    if need_b:
        gated = (middle * gates).to(dtype)
        grad_b = torch.empty((outs, experts, rank), dtype=dtype, device=x.device)
        out = grad_b.permute(1, 0, 2)
        mm_weights(gradient, gated, ends, turns, out, gather="left", **where)
    if not (need_x or need_a or need_weights):
        return grad_x, grad_a, grad_b, grad_weights
    ranks = mm_rows(
        gradient, lora_b.permute(1, 2, 0), tiles, num_rows=num_rows, index=order, slots=slots
    )
    if need_weights:
        filled = torch.arange(num_rows, device=x.device) < ends[-1]
        dots = torch.where(filled, (ranks.float() * middle).sum(1) * scaling, 0.0)
        grad_weights = dots.index_select(0, inverse).view(weights.shape).to(weights.dtype)
    ranks = (ranks * gates).to(dtype)
    if need_a:
        grad_a = torch.empty((experts, rank, ins), dtype=dtype, device=x.device)
        rows = row_major(x.to(dtype))
        mm_weights(ranks, rows, ends, turns, grad_a, gather="right", **where)
    if need_x:
        rows = mm_rows(ranks, lora_a.transpose(1, 2), tiles, num_rows=num_rows)
        grad_x = combine(rows, inverse, ends, ids.shape[0])
    return grad_x, grad_a, grad_b, grad_weights
