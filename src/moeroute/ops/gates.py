"""Gates in rank space: any mixture of LoRA over one linear is one LoRA whose ranks are gated.

Axes: T tokens, K slots per token, E experts, R ranks of all experts, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def expert_table(selected_experts: Tensor, routing_weights: Tensor, size: int) -> Tensor:
    """Each token's weight for each expert.

    Args:
        selected_experts: (T, K) integers; anything outside [0, size) is an empty slot, whose weight
            is not read.
        routing_weights: (T, K) floating.
        size: E.

    Returns:
        (T, E) in the dtype of routing_weights; slots that name one expert add up.
    """
    filled = (selected_experts >= 0) & (selected_experts < size)
    weights = routing_weights.masked_fill(~filled, 0.0)
    table = weights.new_zeros(selected_experts.shape[0], size)
    return table.scatter_add(1, torch.where(filled, selected_experts, 0), weights)


def rank_gated_lora(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, gates: Tensor
) -> Tensor:
    """Add a LoRA whose ranks each token gates for itself.

        y = base + ((x A^T) * gates) B^T

    Computed in the dtype of lora_a (under autocast, in its dtype), added in float32 or wider and
    rounded once to the dtype of base; with lora_b at zero the result equals base bit for bit.
    Differentiable in everything; nothing wider than (T, R) is kept.

    Args:
        base: (T, O).
        x: (T, I).
        lora_a: (R, I).
        lora_b: (O, R).
        gates: (T, R), the scaling included.

    Returns:
        (T, O) in the dtype of base.
    """
    middle = functional.linear(x.to(lora_a.dtype), lora_a)
    delta = functional.linear(middle * gates.to(middle.dtype), lora_b)
    return add_delta(base, delta)


def add_delta(base: Tensor, delta: Tensor) -> Tensor:
    """Base plus delta, summed in float32 or wider, in the dtype of base."""
    wide = torch.promote_types(torch.promote_types(base.dtype, delta.dtype), torch.float32)
    return (base.to(wide) + delta.to(wide)).to(base.dtype)
