"""The dense form of `gated_lora`: one LoRA of rank E * R, its ranks gated between two products.

Axes: T tokens, K slots per token, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["backward", "forward"]


class _Gates(NamedTuple):
    """Scaled weights per expert.

    Attributes:
        values: (T, E, 1) float32 or wider, scaling * weight, 0 where an expert is not selected.
        slots: (T, K) int64 columns of values; E in an empty slot.
        experts: E, or E + 1 where slots may hold E.
        dead: (T, 1) bool, tokens of which no slot is filled, or None when there are no empty slots.
    """

    values: Tensor
    slots: Tensor
    experts: int
    dead: Tensor | None


def _all_filled(ids: Tensor, experts: int) -> bool:
    """Whether no slot is empty; on another device than a CPU nobody waits for the answer."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return ids.numel() == 0
    low, high = ids.aminmax()
    return int(low) >= 0 and int(high) < experts


def _gates(ids: Tensor, weights: Tensor, experts: int, scaling: float, like: torch.dtype) -> _Gates:
    wide = torch.promote_types(torch.promote_types(weights.dtype, like), torch.float32)
    slots, columns, dead = ids.long(), experts, None
    if not _all_filled(ids, experts):
        filled = (ids >= 0) & (ids < experts)
        # One more column takes the weights of the empty slots and is dropped.
        slots, columns = torch.where(filled, slots, experts), experts + 1
        dead = ~filled.any(1, keepdim=True)
    values = weights.new_zeros((ids.shape[0], columns), dtype=wide)
    values.scatter_add_(1, slots, (weights * scaling).to(wide))
    return _Gates(values[:, :experts].unsqueeze(2), slots, columns, dead)


def _live(rows: Tensor, dtype: torch.dtype, gates: _Gates) -> Tensor:
    """Rows in the compute dtype, zero where a token has no filled slot: those may hold anything."""
    rows = rows.to(dtype)
    return rows if gates.dead is None else rows.masked_fill(gates.dead, 0)


def _gated(ranks: Tensor, gates: Tensor) -> Tensor:
    """(T, E * R) times the gates (T, E, 1), in the dtype of ranks."""
    product = ranks.unflatten(1, (gates.shape[1], -1)) * gates
    return product.to(ranks.dtype).flatten(1)


def forward(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Two products over all ranks.

    Args:
        base: (T, O).
        x: (T, I).
        lora_a: (E, R, I).
        lora_b: (O, E, R).
        ids: (T, K).
        weights: (T, K).
        scaling: Multiplies the sum.
        dtype: To compute in.

    Returns:
        (T, O) in the dtype of base, and x A^T (T, E * R) in dtype, for `backward`.
    """
    gates = _gates(ids, weights, lora_a.shape[0], scaling, dtype)
    middle = torch.mm(_live(x, dtype, gates), lora_a.flatten(0, 1).to(dtype).t())
    gated, up = _gated(middle, gates.values), lora_b.flatten(1).to(dtype).t()
    if base.dtype == dtype:
        return torch.addmm(base, gated, up), middle
    return (base + torch.mm(gated, up)).to(base.dtype).contiguous(), middle


def backward(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to x, lora_a, lora_b and weights, each only where needs says so.

    Args:
        grad: (T, O).
        x: (T, I).
        middle: (T, E * R), of `forward`; its dtype is computed in.
        lora_a: (E, R, I).
        lora_b: (O, E, R).
        ids: (T, K).
        weights: (T, K).
        scaling: Multiplies the sum.
        needs: For x, lora_a, lora_b, weights.

    Returns:
        Four gradients in the compute dtype or wider, None where not needed.
    """
    dtype = middle.dtype
    need_x, need_a, need_b, need_weights = needs
    gates = _gates(ids, weights, lora_a.shape[0], scaling, dtype)
    grad = _live(grad, dtype, gates)
    grad_x = grad_a = grad_b = grad_weights = None
    if need_b:
        grad_b = torch.mm(grad.t(), _gated(middle, gates.values))
    if need_x or need_a or need_weights:
        ranks = torch.mm(grad, lora_b.flatten(1).to(dtype))
        if need_weights:
            grad_weights = _weights_gradient(ranks, middle, gates, scaling)
        if need_x or need_a:
            ranks = _gated(ranks, gates.values)
        if need_a:
            grad_a = torch.mm(ranks.t(), _live(x, dtype, gates))
        if need_x:
            grad_x = torch.mm(ranks, lora_a.flatten(0, 1).to(dtype))
    return grad_x, grad_a, grad_b, grad_weights


def _weights_gradient(ranks: Tensor, middle: Tensor, gates: _Gates, scaling: float) -> Tensor:
    experts = gates.values.shape[1]
    products = ranks.to(gates.values.dtype) * middle
    per_expert = products.unflatten(1, (experts, -1)).sum(2)
    if gates.experts > experts:
        per_expert = torch.nn.functional.pad(per_expert, (0, 1))
    return per_expert.gather(1, gates.slots) * scaling
