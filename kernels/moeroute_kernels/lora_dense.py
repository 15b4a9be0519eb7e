"""The dense form of `gated_lora`: one LoRA of rank E * R, its ranks gated between two products.

Axes: T tokens, K slots per token, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeroute_kernels.lora_slots import all_filled

__all__ = ["backward", "forward", "forward_if_filled"]


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
    if rows.dtype != dtype:
        rows = rows.to(dtype)
    return rows if dead is None else rows.masked_fill(dead, 0)


def _stack(lora: Tensor, dtype: torch.dtype, first: int) -> Tensor:
    """A stack in the compute dtype as a matrix, its dimensions first and first + 1 made one."""
    lora = lora.flatten(first, first + 1)
    return lora if lora.dtype == dtype else lora.to(dtype)


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
    experts = lora_a.shape[0]
    slots, dead = _slots(ids, experts)
    scaled = _scaled(weights, scaling, dtype)
    # Where slots are empty, one more column takes their weights and is dropped.
    columns = experts if dead is None else experts + 1
    gates = scaled.new_zeros((x.shape[0], columns)).scatter_add_(1, slots, scaled)
    if dead is not None:
        gates = gates[:, :experts].contiguous()
    out, middle = _mix(base, _live(x, dtype, dead), lora_a, lora_b, gates, dtype)
    return out, middle, gates


def forward_if_filled(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor | None:
    """The output of `forward` in torch's own autograd, for CPU tensors without an empty slot.

    A node of our own in the graph costs 0.1 ms a step, a fifth of 64 tokens over 32 ranks.

    Args:
        base: As in `forward`, like all others.
        x: (T, I).
        lora_a: (E, R, I).
        lora_b: (O, E, R).
        ids: (T, K).
        weights: (T, K).
        scaling: Multiplies the sum.
        dtype: To compute in.

    Returns:
        (T, O) in the dtype of base, or None when a slot is empty.
    """
    scaled = _scaled(weights, scaling, dtype)
    gates = torch.zeros((x.shape[0], lora_a.shape[0]), dtype=scaled.dtype)
    try:
        gates.scatter_add_(1, ids.long(), scaled)
    except RuntimeError:  # It checks each index: a check of our own would read all of them again.
        return None
    x = x if x.dtype == dtype else x.to(dtype)
    return _mix(base, x, lora_a, lora_b, gates, dtype)[0]


def _scaled(weights: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Routing weights times scaling, in float32 or wider."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scaled = weights * scaling
    return scaled if scaled.dtype == wide else scaled.to(wide)


def _mix(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, gates: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """base + (x A^T * gates) B^T in the dtype of base, and x A^T (T, E * R) in dtype."""
    middle = torch.mm(x, _stack(lora_a, dtype, 0).t())
    gated = middle.view(*gates.shape, lora_a.shape[1]) * gates.unsqueeze(2)
    if gated.dtype != dtype:
        gated = gated.to(dtype)
    gated, up = gated.view(middle.shape), _stack(lora_b, dtype, 1).t()
    if base.dtype == dtype:
        return torch.addmm(base, gated, up), middle
    return (base + torch.mm(gated, up)).to(base.dtype).contiguous(), middle


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
    dtype, shape = middle.dtype, (*gates.shape, lora_a.shape[1])
    slots, dead = _slots(ids, shape[1])
    gates = gates.unsqueeze(2)
    grad = _live(grad, dtype, dead)
    grad_x = grad_a = grad_b = grad_weights = None
    if need_b:
        gated = middle.view(shape) * gates
        if gated.dtype != dtype:
            gated = gated.to(dtype)
        grad_b = torch.mm(grad.t(), gated.view(middle.shape)).view(lora_b.shape)
    if need_x or need_a or need_weights:
        ranks = torch.mm(grad, _stack(lora_b, dtype, 1))
        per_rank = ranks.view(shape)
        if need_weights:
            grad_weights = _weights_gradient(per_rank, middle.view(shape), slots, dead, gates.dtype)
            grad_weights.mul_(scaling)
        per_rank.mul_(gates)
        if need_a:
            grad_a = torch.mm(ranks.t(), _live(x, dtype, dead)).view(lora_a.shape)
        if need_x:
            grad_x = torch.mm(ranks, _stack(lora_a, dtype, 0))
    return grad_x, grad_a, grad_b, grad_weights


def _weights_gradient(
    ranks: Tensor, middle: Tensor, slots: Tensor, dead: Tensor | None, wide: torch.dtype
) -> Tensor:
    if ranks.dtype != wide:
        ranks = ranks.to(wide)
    per_expert = (ranks * middle).sum(2)
    if dead is not None:
        per_expert = torch.nn.functional.pad(per_expert, (0, 1))
    return per_expert.gather(1, slots)
