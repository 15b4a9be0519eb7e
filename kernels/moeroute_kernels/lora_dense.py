"""The dense form of `gated_lora`: one LoRA of rank E * R, its ranks gated between two products.

Axes: T tokens, K slots per token, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeroute_kernels.lora_slots import all_filled

__all__ = ["backward", "forward"]


def _slots(ids: Tensor, experts: int) -> tuple[Tensor, Tensor | None]:
    """Slots as columns of the gates.

    Returns:
        (T, K) int64, E in an empty slot, and (T, 1) bool, the tokens without a filled slot, or None
        when no slot is empty.
    """
    if all_filled(ids, experts):
        return ids.long(), None
    filled = (ids >= 0) & (ids < experts)
    return torch.where(filled, ids.long(), experts), ~filled.any(1, keepdim=True)


def _live(rows: Tensor, dtype: torch.dtype, dead: Tensor | None) -> Tensor:
    """Rows in the compute dtype, zero where a token has no filled slot: those may hold anything."""
    rows = rows.to(dtype)
    return rows if dead is None else rows.masked_fill(dead, 0)


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
        (T, O) in the dtype of base, and for `backward` x A^T (T, E * R) in dtype and the gates
        (T, E), scaling * weight in float32 or wider, 0 where an expert is not selected.
    """
    tokens, (experts, rank, _) = x.shape[0], lora_a.shape
    slots, dead = _slots(ids, experts)
    wide = torch.promote_types(torch.promote_types(weights.dtype, dtype), torch.float32)
    # Where slots are empty, one more column takes their weights and is dropped.
    columns = experts if dead is None else experts + 1
    gates = weights.new_zeros((tokens, columns), dtype=wide)
    gates.scatter_add_(1, slots, (weights * scaling).to(wide))
    if dead is not None:
        gates = gates[:, :experts].contiguous()
    middle = torch.mm(_live(x, dtype, dead), lora_a.flatten(0, 1).to(dtype).t())
    gated = middle.view(tokens, experts, rank) * gates.unsqueeze(2)
    gated, up = gated.to(dtype).view(middle.shape), lora_b.flatten(1).to(dtype).t()
    if base.dtype == dtype:
        return torch.addmm(base, gated, up), middle, gates
    return (base + torch.mm(gated, up)).to(base.dtype).contiguous(), middle, gates


def backward(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    gates: Tensor,
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
        x: (T, I); read for lora_a alone.
        middle: (T, E * R), of `forward`; its dtype is computed in. Read for lora_b and weights.
        gates: (T, E), of `forward`.
        lora_a: (E, R, I).
        lora_b: (O, E, R).
        ids: (T, K).
        weights: (T, K); not read.
        scaling: Multiplies the sum.
        needs: For x, lora_a, lora_b, weights.

    Returns:
        Four gradients in the compute dtype or wider, None where not needed.
    """
    need_x, need_a, need_b, need_weights = needs
    dtype, (experts, rank, _) = middle.dtype, lora_a.shape
    slots, dead = _slots(ids, experts)
    shape = (gates.shape[0], experts, rank)
    gates = gates.unsqueeze(2)
    grad = _live(grad, dtype, dead)
    grad_x = grad_a = grad_b = grad_weights = None
    if need_b:
        gated = (middle.view(shape) * gates).to(dtype)
        grad_b = torch.mm(grad.t(), gated.view(middle.shape))
    if need_x or need_a or need_weights:
        ranks = torch.mm(grad, lora_b.flatten(1).to(dtype))
        if need_weights:
            per_expert = (ranks.to(gates.dtype) * middle).view(shape).sum(2)
            if dead is not None:
                per_expert = torch.nn.functional.pad(per_expert, (0, 1))
            grad_weights = per_expert.gather(1, slots).mul_(scaling)
        ranks.view(shape).mul_(gates)
        if need_a:
            grad_a = torch.mm(ranks.t(), _live(x, dtype, dead))
        if need_x:
            grad_x = torch.mm(ranks, lora_a.flatten(0, 1).to(dtype))
    return grad_x, grad_a, grad_b, grad_weights
