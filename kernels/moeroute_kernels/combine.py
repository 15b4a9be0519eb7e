"""The weighted sum of each token's rows, in slot order: one op with fake and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SCHEMA = "(Tensor rows, Tensor routing_weights, Tensor inverse, Tensor expert_offsets) -> Tensor"
_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor rows, Tensor routing_weights, Tensor inverse, Tensor expert_offsets,"
    " bool[] needs) -> Tensor[]"
)


def _accumulator(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


@torch.library.custom_op("moeroute::combine", mutates_args=(), schema=_SCHEMA)
def combine_op(
    rows: Tensor, routing_weights: Tensor, inverse: Tensor, expert_offsets: Tensor
) -> Tensor:
    """The default kernel: any device, one gather per slot."""
    compute = _accumulator(rows)
    num_tokens = routing_weights.shape[0]
    total = torch.zeros((num_tokens, rows.shape[1]), dtype=compute, device=rows.device)
    row_of_slot = inverse.view(routing_weights.shape)
    filled = row_of_slot < expert_offsets[-1]
    weights = torch.where(filled, routing_weights.to(compute), 0)
    for slot in range(row_of_slot.shape[1]):
        row = torch.where(filled[:, slot], row_of_slot[:, slot], 0)
        picked = rows.index_select(0, row).to(compute)
        picked.masked_fill_(~filled[:, slot, None], 0)
        total.addcmul_(picked, weights[:, slot, None])
    return total.to(rows.dtype)


@combine_op.register_fake
def _(rows: Tensor, routing_weights: Tensor, inverse: Tensor, expert_offsets: Tensor) -> Tensor:
    return rows.new_empty((routing_weights.shape[0], rows.shape[1]))


@torch.library.custom_op("moeroute::combine_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def combine_backward_op(
    gradient: Tensor,
    rows: Tensor,
    routing_weights: Tensor,
    inverse: Tensor,
    expert_offsets: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of rows and routing_weights, those that `needs` asks for."""
    compute = _accumulator(rows)
    num_slots = routing_weights.shape[1]
    row_of_slot = inverse.view(routing_weights.shape)
    filled = row_of_slot < expert_offsets[-1]
    weights = torch.where(filled, routing_weights.to(compute), 0)
    gradient = gradient.to(compute)
    rows_gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    weights_gradient = torch.zeros_like(weights)
    for slot in range(num_slots):
        if needs[0]:
            share = (gradient * weights[:, slot, None]).to(rows.dtype)
            rows_gradient.index_copy_(0, row_of_slot[:, slot], share)
        if needs[1]:
            row = torch.where(filled[:, slot], row_of_slot[:, slot], 0)
            dots = (rows.index_select(0, row).to(compute) * gradient).sum(1)
            weights_gradient[:, slot] = torch.where(filled[:, slot], dots, 0)
    results = [rows_gradient] if needs[0] else []
    if needs[1]:
        results.append(weights_gradient.to(routing_weights.dtype))
    return results


@combine_backward_op.register_fake
def _(
    gradient: Tensor,
    rows: Tensor,
    routing_weights: Tensor,
    inverse: Tensor,
    expert_offsets: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    pairs = zip(needs, (rows, routing_weights), strict=True)
    return [
        torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for need, like in pairs
        if need
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, None
    needs = list(ctx.needs_input_grad[:2])
    found = iter(combine_backward_op(gradient, *ctx.saved_tensors, needs))
    rows_gradient, weights_gradient = (next(found) if need else None for need in needs)
    return rows_gradient, weights_gradient, None, None


torch.library.register_autograd(combine_op, _backward, setup_context=_setup_context)


def combine(
    rows: Tensor, routing_weights: Tensor, inverse: Tensor, expert_offsets: Tensor
) -> Tensor:
    """Sum each token's rows, weighted, in slot order.

        out[t] = sum_k routing_weights[t, k] * rows[inverse[t * K + k]]

    Accumulates in float32 (float64 for float64 rows), deterministic. Gradients reach rows and
    routing_weights, each made only if asked for.

    Args:
        rows: (N, O) rows in expert order, any strides, N = T * K.
        routing_weights: (T, K), any floating dtype.
        inverse: (N,) int64, the row of each flat slot, as `expert_sort` gives it.
        expert_offsets: (E,) inclusive ends; rows from expert_offsets[-1] on are empty slots: never
            read, with a zero gradient.

    Returns:
        (T, O) in the dtype of rows; zero for a token whose slots are all empty.

    Raises:
        ValueError: shapes do not fit.
    """
    num_slots = routing_weights.numel()
    if rows.ndim != 2 or routing_weights.ndim != 2 or rows.shape[0] != num_slots:
        raise ValueError(
            f"combine: rows {tuple(rows.shape)} and routing_weights {tuple(routing_weights.shape)} "
            "do not fit; give (T * K, O) and (T, K)"
        )
    if inverse.shape != (num_slots,):
        raise ValueError(
            f"combine: inverse {tuple(inverse.shape)} must be ({num_slots},), one row per slot"
        )
    return combine_op(rows, routing_weights, inverse, expert_offsets)
