"""The routed MLP in plain torch: sort, gather, product, activation, product, gather and sum.

The routing weight multiplies the activated row before the second product, so that a token's rows are
summed as they are, and so that backward finds the weight's gradient as a dot product in the width of
the experts, without their output.

Axes: T tokens, K slots per token, N = T * K rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute_kernels.activations import activate, activate_backward, split_pre_activation
from moeroute_kernels.cpu import (
    Runs,
    add_rows,
    compute_dtype,
    expert_runs,
    mm_rows,
    mm_weights,
    sum_rows,
)
from moeroute_kernels.expert_sort import invert, sort_slots


@dataclass(frozen=True, slots=True)
class Form:
    """What kind of MLP the experts are; see `moeroute_kernels.routed_mlp`."""

    activation: str
    interleaved: bool
    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class Weights:
    """The experts' parameters: gate_up (E, 2I or I, H), down (E, H, I) and their biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def forward(
    x: Tensor, weights: Weights, ids: Tensor, routing_weights: Tensor, form: Form, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the MLP.

    Args:
        x: (T, H).
        weights: The experts.
        ids: (T, K).
        routing_weights: (T, K).
        form: The kind of MLP.
        keep: Whether the pre-activation is wanted for backward.

    Returns:
        out (T, H); pre (N, 2I or I), empty unless `keep`; order (N,); expert_offsets (E,).
    """
    order, inverse, expert_offsets = sort_slots(ids, weights.gate_up.shape[0])
    runs = expert_runs(expert_offsets)
    filled = runs[-1][2] if runs else 0
    compute = compute_dtype(x)
    token = order[:filled] // max(ids.shape[1], 1)
    rows = x.index_select(0, token).to(compute)
    pre = rows.new_empty((order.shape[0], weights.gate_up.shape[1]))
    mm_rows(rows, weights.gate_up, runs, pre)
    if weights.gate_up_bias is not None:
        add_rows(pre, weights.gate_up_bias, runs)
    pre[filled:].zero_()
    scale = routing_weights.reshape(-1).index_select(0, order[:filled]).unsqueeze(1)
    activated = (_activated(pre[:filled], form) * scale).to(compute)
    expert_out = rows.new_empty((filled, weights.down.shape[1]))
    mm_rows(activated, weights.down, runs, expert_out)
    if weights.down_bias is not None:
        for expert, start, end in runs:
            expert_out[start:end] += scale[start:end] * weights.down_bias[expert]
    out = sum_slots(expert_out, inverse.view(ids.shape)).to(x.dtype)
    return out, pre if keep else pre.new_empty((0, pre.shape[1])), order, expert_offsets


def backward(
    gradient: Tensor,
    x: Tensor,
    weights: Weights,
    routing_weights: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    form: Form,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, gate_up, down, routing_weights, gate_up_bias, down_bias where `needs` says so.

    Args:
        gradient: (T, H) of the output.
        x: As given to `forward`.
        weights: As given to `forward`.
        routing_weights: As given to `forward`.
        saved: pre, order and expert_offsets that `forward` returned.
        form: As given to `forward`.
        needs: Six booleans, in the order above.
    """
    pre, order, expert_offsets = saved
    runs = expert_runs(expert_offsets)
    filled = runs[-1][2] if runs else 0
    compute = compute_dtype(x)
    order = order[:filled]
    token = order // max(routing_weights.shape[1], 1)
    scale = routing_weights.reshape(-1).index_select(0, order).unsqueeze(1)
    out_rows = gradient.index_select(0, token).to(compute)
    need_x, need_gate_up, need_down, need_routing, need_gate_up_bias, need_down_bias = needs
    results: list[Tensor | None] = [None] * 6
    wide = torch.promote_types(compute, torch.float32)
    pre = pre[:filled].to(wide)
    if need_down:
        activated = (_activated(pre, form) * scale).to(compute)
        results[2] = mm_weights(out_rows, activated, runs, weights.down)
    if need_down_bias and weights.down_bias is not None:
        results[5] = sum_rows(out_rows * scale, runs, weights.down_bias)
    if need_x or need_gate_up or need_routing or need_gate_up_bias:
        inner = out_rows.new_empty((filled, weights.down.shape[2]))
        mm_rows(out_rows, weights.down.transpose(1, 2), runs, inner)
        inner = inner.to(wide)
        if need_routing:
            dots = (_activated(pre, form) * inner).sum(1)
            if weights.down_bias is not None:
                for expert, start, end in runs:
                    dots[start:end] += (out_rows[start:end] * weights.down_bias[expert]).sum(1)
            flat = routing_weights.new_zeros((routing_weights.numel(),))
            flat[order] = dots.to(flat.dtype)
            results[3] = flat.view(routing_weights.shape)
        gate, up = split_pre_activation(pre, form.activation, interleaved=form.interleaved)
        pair = activate_backward(
            inner * scale, gate, up, form.activation, alpha=form.alpha, limit=form.limit
        )
        if pair[1] is None:
            pre_gradient = pair[0].to(compute)
        else:
            pre_gradient = torch.empty(pre.shape, dtype=compute, device=pre.device)
            gate, up = split_pre_activation(
                pre_gradient, form.activation, interleaved=form.interleaved
            )
            gate.copy_(pair[0])
            up.copy_(pair[1])
        if need_gate_up_bias and weights.gate_up_bias is not None:
            results[4] = sum_rows(pre_gradient, runs, weights.gate_up_bias)
        if need_gate_up:
            rows = x.index_select(0, token).to(compute)
            results[1] = mm_weights(pre_gradient, rows, runs, weights.gate_up)
        if need_x:
            rows_gradient = out_rows
            mm_rows(pre_gradient, weights.gate_up.transpose(1, 2), runs, rows_gradient)
            inverse = invert(torch.cat([order, saved[1][filled:]]))
            results[0] = sum_slots(rows_gradient, inverse.view(routing_weights.shape)).to(x.dtype)
    return [result for result in results if result is not None]


def _activated(pre: Tensor, form: Form) -> Tensor:
    gate, up = split_pre_activation(pre, form.activation, interleaved=form.interleaved)
    return activate(gate, up, form.activation, alpha=form.alpha, limit=form.limit)


def sum_slots(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    """Sum each token's rows in slot order, in float32 (float64 for float64 rows).

    Args:
        rows: (n, H); the slots whose row is n or more are empty.
        row_of_slot: (T, K).

    Returns:
        (T, H) in the dtype of the accumulator.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(row_of_slot.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    filled = row_of_slot < rows.shape[0]
    for slot in range(row_of_slot.shape[1]):
        token = filled[:, slot].nonzero().squeeze(1)
        total.index_add_(0, token, rows[row_of_slot[token, slot]].to(wide))
    return total
