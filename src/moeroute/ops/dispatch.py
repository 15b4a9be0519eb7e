"""Rows in expert order: the plan, the way there and the way back.

For experts that are general modules. Experts stored as 3-D weights call `expert_mm.routed_mlp`,
which does all of this in one op.

Axes: T tokens, K slots per token, N = T * K rows, E experts, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeroute.types import DispatchPlan, RouterOutput
from moeroute_kernels import combine as combine_rows
from moeroute_kernels import expert_sort


def plan_slots(selected_experts: Tensor, num_groups: int) -> DispatchPlan:
    """Sort slots by expert: stable, empty slots last, no host synchronisation.

    Args:
        selected_experts: (T, K) integers; anything outside [0, num_groups) is an empty slot.
        num_groups: E, at least 1.

    Returns:
        The plan; N = T * K rows.

    Raises:
        ValueError: selected_experts is no matrix of integers, or num_groups is below 1.
    """
    slots = expert_sort(selected_experts, num_groups)
    return DispatchPlan(
        token_index=slots.order // max(selected_experts.shape[1], 1),
        slot_index=slots.order,
        row_index=slots.inverse,
        expert_offsets=slots.expert_offsets,
    )


def plan_dispatch(routing: RouterOutput) -> DispatchPlan:
    """Sort a routing's slots by expert; E is read off its logits.

    Args:
        routing: What a router answered for T tokens.

    Returns:
        The plan; N = T * K rows.
    """
    return plan_slots(routing.selected_experts, routing.num_experts)


def dispatch(tokens: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token to the rows of its experts.

    Args:
        tokens: (T, H), any floating dtype, any strides; receives a gradient, summed over a token's
            slots in slot order (deterministic) in float32 or wider.
        plan: A plan over the same tokens.

    Returns:
        (N, H) rows in expert order, in the dtype of tokens. Rows from expert_offsets[-1] on belong
        to empty slots; the gradient that arrives at them is never read.
    """
    return _dispatch_op(tokens, plan.token_index, plan.row_index, plan.expert_offsets)


def combine(rows: Tensor, routing_weights: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum each token's rows, weighted, in slot order.

        out[t] = sum_k routing_weights[t, k] * rows[row_index[t * K + k]]

    Args:
        rows: (N, H) rows in expert order; rows of empty slots are never read.
        routing_weights: (T, K).
        plan: The plan that ordered the rows.

    Returns:
        (T, H) in the dtype of rows, accumulated in float32 or wider; zero for a token whose slots
        are all empty. Gradients reach rows and routing_weights.

    Raises:
        ValueError: The shapes do not belong together.
    """
    return combine_rows(rows, routing_weights, plan.row_index, plan.expert_offsets)


@torch.library.custom_op("moeroute::dispatch", mutates_args=())
def _dispatch_op(
    tokens: Tensor, token_index: Tensor, row_index: Tensor, expert_offsets: Tensor
) -> Tensor:
    return tokens.index_select(0, token_index)


@_dispatch_op.register_fake
def _(tokens: Tensor, token_index: Tensor, row_index: Tensor, expert_offsets: Tensor) -> Tensor:
    return tokens.new_empty((token_index.shape[0], tokens.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    tokens, _, row_index, expert_offsets = inputs
    ctx.num_tokens = tokens.shape[0]
    ctx.save_for_backward(row_index, expert_offsets)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Undo the gather with `combine`: every weight 1, empty slots not read."""
    row_index, expert_offsets = ctx.saved_tensors
    slots = row_index.shape[0] // max(ctx.num_tokens, 1)
    ones = gradient.new_ones((ctx.num_tokens, slots))
    return combine_rows(gradient, ones, row_index, expert_offsets), None, None, None


torch.library.register_autograd(_dispatch_op, _backward, setup_context=_setup_context)
