"""The weighted sum of each token's rows, in slot order: one op with fake and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeroute_kernels.cpu_rows import row_pieces, sum_slots, to_slots, widened
from moeroute_kernels.expert_sort import invert

_SCHEMA = "(Tensor rows, Tensor routing_weights, Tensor inverse, Tensor expert_offsets) -> Tensor"
_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor rows, Tensor routing_weights, Tensor inverse, Tensor expert_offsets,"
    " bool[] needs) -> Tensor[]"
)


def plain_combine(
    rows: Tensor, routing_weights: Tensor, inverse: Tensor, expert_offsets: Tensor
) -> Tensor:
    """The default kernel: any device, plain torch."""
    filled = int(expert_offsets[-1])
    summands = widened(rows[:filled])
    scale = routing_weights.reshape(-1).to(summands.dtype)
    return sum_slots(summands, inverse, routing_weights.shape[0], scale).to(rows.dtype)


combine_op = torch.library.custom_op(
    "moeroute::combine", plain_combine, mutates_args=(), schema=_SCHEMA
)


@combine_op.register_fake
def _(rows: Tensor, routing_weights: Tensor, inverse: Tensor, expert_offsets: Tensor) -> Tensor:
    return rows.new_empty((routing_weights.shape[0], rows.shape[1]))


def plain_combine_backward(
    gradient: Tensor,
    rows: Tensor,
    routing_weights: Tensor,
    inverse: Tensor,
    expert_offsets: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of rows and routing_weights, those that `needs` asks for."""
    filled = int(expert_offsets[-1])
    slot = invert(inverse)[:filled]
    token = slot // max(routing_weights.shape[1], 1)
    scale = routing_weights.reshape(-1).index_select(0, slot).unsqueeze(1)
    rows_gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    rows_gradient[filled:].zero_()
    dots = widened(rows.new_empty((filled,)))
    for piece in row_pieces(rows[:filled]):
        share = widened(gradient.index_select(0, token[piece]))
        if needs[1]:
            dots[piece] = (share * rows[piece]).sum(1)
        if needs[0]:
            rows_gradient[piece] = share * scale[piece]
    results = [rows_gradient] if needs[0] else []
    if needs[1]:
        results.append(to_slots(dots, slot, routing_weights))
    return results


combine_backward_op = torch.library.custom_op(
    "moeroute::combine_backward", plain_combine_backward, mutates_args=(), schema=_BACKWARD_SCHEMA
)


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
