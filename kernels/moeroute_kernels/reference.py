"""Every op in plain differentiable torch: the definition that the fast paths are tested against.

Half-precision inputs are computed in float32 and the result is rounded once; float64 stays float64.

Axes: T tokens, K slots per token, N = T * K rows, E experts, H hidden, I intermediate, O out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeroute_kernels.activations import activate, split_pre_activation
from moeroute_kernels.reference_lora import gated_lora

__all__ = ["SortedSlots", "combine", "expert_sort", "gated_lora", "grouped_mm", "routed_mlp"]


class SortedSlots(NamedTuple):
    """Slots in the order of their experts.

    Attributes:
        order: (N,) int64, the flat slot t * K + k that stands at each sorted row.
        inverse: (N,) int64, the sorted row of each flat slot.
        expert_offsets: (E,) int32, inclusive ends of the experts' rows; the rows from
            expert_offsets[-1] on are empty slots.
    """

    order: Tensor
    inverse: Tensor
    expert_offsets: Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _ends(expert_offsets: Tensor) -> list[int]:
    return [int(end) for end in expert_offsets.tolist()]


def expert_sort(ids: Tensor, num_groups: int) -> SortedSlots:
    """Sort slots by expert: stable, empty slots last.

    Args:
        ids: (T, K) integers; anything outside [0, num_groups) is an empty slot.
        num_groups: E.

    Returns:
        The order, its inverse and the experts' ends.
    """
    flat = ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < num_groups), flat, num_groups)
    order = torch.argsort(flat, stable=True)
    inverse = torch.argsort(order, stable=True)
    counts = torch.stack([(flat == group).sum() for group in range(num_groups)])
    return SortedSlots(order, inverse, counts.cumsum(0).int())


def grouped_mm(
    x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply each expert's rows with its own matrix.

    Args:
        x: (N, I) rows in expert order.
        weight: (E, O, I).
        expert_offsets: (E,) inclusive ends.
        bias: (E, O) or None.

    Returns:
        (N, O) in the dtype of x; rows past the last end are zero.
    """
    compute = _compute_dtype(x.dtype)
    pieces, start = [], 0
    for expert, end in enumerate(_ends(expert_offsets)):
        piece = x[start:end].to(compute) @ weight[expert].to(compute).t()
        pieces.append(piece if bias is None else piece + bias[expert].to(compute))
        start = end
    pieces.append(x.new_zeros((x.shape[0] - start, weight.shape[1]), dtype=compute))
    return torch.cat(pieces).to(x.dtype)


def combine(
    rows: Tensor, routing_weights: Tensor, inverse: Tensor, expert_offsets: Tensor
) -> Tensor:
    """Sum each token's rows, weighted, in slot order.

    Args:
        rows: (N, O) rows in expert order.
        routing_weights: (T, K).
        inverse: (N,) the row of each flat slot.
        expert_offsets: (E,) inclusive ends; rows past the last one are never read.

    Returns:
        (T, O) in the dtype of rows.
    """
    compute = _compute_dtype(rows.dtype)
    total = rows.new_zeros((routing_weights.shape[0], rows.shape[1]), dtype=compute)
    row_of_slot = inverse.reshape(routing_weights.shape)
    for slot in range(routing_weights.shape[1]):
        row = row_of_slot[:, slot]
        filled = (row < expert_offsets[-1]).nonzero().squeeze(1)
        weight = routing_weights[filled, slot].to(compute).unsqueeze(1)
        total = total.index_add(0, filled, weight * rows[row[filled]].to(compute))
    return total.to(rows.dtype)


def routed_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu_glu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = float("inf"),
) -> Tensor:
    """Every token through its experts' MLPs, summed with the routing weights.

        y[t] = sum_k w[t, k] * (down[e] act(gate_up[e] x[t] + b1[e]) + b2[e]),  e = ids[t, k]

    Args:
        x: (T, H).
        gate_up: (E, 2I, H) for a gated activation, (E, I, H) otherwise.
        down: (E, H, I).
        selected_experts: (T, K); anything outside [0, E) is an empty slot.
        routing_weights: (T, K).
        gate_up_bias: (E, 2I) or (E, I) or None.
        down_bias: (E, H) or None.
        activation: Key of `moeroute_kernels.activations.ACTIVATIONS`.
        interleaved: Rows of gate_up alternate gate, up.
        alpha: See `moeroute_kernels.activations.activate`.
        limit: See `moeroute_kernels.activations.activate`.

    Returns:
        (T, H) in the dtype of x.
    """
    compute = _compute_dtype(x.dtype)
    total = x.new_zeros((x.shape[0], down.shape[1]), dtype=compute)
    for slot in range(selected_experts.shape[1]):
        for expert in range(gate_up.shape[0]):
            token = (selected_experts[:, slot] == expert).nonzero().squeeze(1)
            pre = x[token].to(compute) @ gate_up[expert].to(compute).t()
            if gate_up_bias is not None:
                pre = pre + gate_up_bias[expert].to(compute)
            gate, up = split_pre_activation(pre, activation, interleaved=interleaved)
            row = activate(gate, up, activation, alpha=alpha, limit=limit)
            row = row @ down[expert].to(compute).t()
            if down_bias is not None:
                row = row + down_bias[expert].to(compute)
            weight = routing_weights[token, slot].to(compute).unsqueeze(1)
            total = total.index_add(0, token, weight * row)
    return total.to(x.dtype)
