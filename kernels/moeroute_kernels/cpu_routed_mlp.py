"""The routed MLP in plain torch: sort, gather, product, activation, product, gather and sum.

The routing weight multiplies the activated row before the second product, so that a token's rows
are summed as they are, and so that backward finds the weight's gradient as a dot product in the
width of the experts, without their output. Pointwise work runs in float32 on pieces that stay in
the cache; the gathered rows, the experts' output and the gathered gradients take turns in one (N,
H) buffer.

Axes: T tokens, K slots per token, N = T * K rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute_kernels.activations import activate, split_pre_activation
from moeroute_kernels.cpu import (
    Runs,
    add_rows,
    compute_dtype,
    expert_runs,
    mm_rows,
    mm_rows_padded,
)
from moeroute_kernels.cpu_rows import gather, row_pieces, sum_slots, widened
from moeroute_kernels.expert_sort import sort_slots


@dataclass(frozen=True, slots=True)
class Form:
    """What kind of MLP the experts are; see `moeroute_kernels.routed_mlp`."""

    activation: str
    interleaved: bool
    alpha: float
    limit: float

    def split(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """View the gate and up parts of a pre-activation."""
        return split_pre_activation(pre, self.activation, interleaved=self.interleaved)


@dataclass(frozen=True, slots=True)
class Weights:
    """The experts' parameters: gate_up (E, 2I or I, H), down (E, H, I) and their biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Saved:
    """What `forward` keeps for `backward`.

    Attributes:
        pre: (N, 2I or I), the pre-activation; zero in the rows of empty slots.
        order: (N,) int64, the flat slot of each row.
        expert_offsets: (E,) int32, inclusive ends.
    """

    pre: Tensor
    order: Tensor
    expert_offsets: Tensor


def forward(
    x: Tensor, weights: Weights, ids: Tensor, routing_weights: Tensor, form: Form
) -> tuple[Tensor, Saved]:
    """Compute the MLP.

    Args:
        x: (T, H).
        weights: The experts.
        ids: (T, K).
        routing_weights: (T, K).
        form: The kind of MLP.

    Returns:
        (T, H) in the dtype of x, and what `backward` needs.
    """
    order, inverse, expert_offsets = sort_slots(ids, weights.gate_up.shape[0])
    runs = expert_runs(expert_offsets)
    slot = order[: runs.filled]
    wide = gather(x, slot // max(ids.shape[1], 1), compute_dtype(x))
    pre = mm_rows_padded(wide, weights.gate_up, runs, order.shape[0])
    if weights.gate_up_bias is not None:
        add_rows(pre, weights.gate_up_bias, runs)
    scale = routing_weights.reshape(-1).index_select(0, slot).unsqueeze(1)
    expert_out = _second_half(pre, scale, weights, runs, form, buffer=wide)
    out = sum_slots(expert_out, inverse, ids.shape[0]).to(x.dtype)
    return out, Saved(pre, order, expert_offsets)


def decode(x: Tensor, weights: Weights, ids: Tensor, routing_weights: Tensor, form: Form) -> Tensor:
    """Compute the MLP of one token: a row per slot, nothing to sort, gather or keep.

    Args:
        x: (1, H).
        weights: The experts.
        ids: (1, K).
        routing_weights: (1, K).
        form: The kind of MLP.

    Returns:
        (1, H) in the dtype of x.
    """
    num_experts = weights.gate_up.shape[0]
    filled = [(k, e) for k, e in enumerate(ids[0].tolist()) if 0 <= e < num_experts]
    if not filled:
        return x.new_zeros((1, weights.down.shape[1]))
    slots, experts = [list(column) for column in zip(*filled, strict=True)]
    scale = routing_weights.reshape(-1, 1)
    if len(slots) < scale.shape[0]:
        scale = scale[slots]
    runs = Runs(experts, [1] * len(slots), len(slots), None)
    rows = x.to(compute_dtype(x)).expand(len(slots), -1)
    pre = mm_rows(rows, weights.gate_up, runs)
    if weights.gate_up_bias is not None:
        add_rows(pre, weights.gate_up_bias, runs)
    expert_out = _second_half(pre, scale, weights, runs, form)
    accumulator = torch.promote_types(x.dtype, torch.float32)
    return expert_out.sum(0, keepdim=True, dtype=accumulator).to(x.dtype)


def _second_half(
    pre: Tensor,
    scale: Tensor,
    weights: Weights,
    runs: Runs,
    form: Form,
    buffer: Tensor | None = None,
) -> Tensor:
    """From the pre-activation to the rows that a token sums: (runs.filled, H)."""
    activated = pre.new_empty((runs.filled, weights.down.shape[2]))
    for rows in row_pieces(activated):
        gate, up = form.split(widened(pre[rows]))
        value = activate(gate, up, form.activation, alpha=form.alpha, limit=form.limit)
        torch.mul(value, scale[rows], out=activated[rows])
    expert_out = mm_rows(activated, weights.down, runs, buffer)
    if weights.down_bias is not None:
        shares, biases = runs.split(scale), runs.matrices(weights.down_bias)
        for piece, share, bias in zip(runs.split(expert_out), shares, biases, strict=True):
            piece.add_(share * bias)
    return expert_out
