"""The gated mixture of LoRA in plain differentiable torch: the definition of `gated_lora`.

Axes: T tokens, K slots per token, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gated_lora"]


def gated_lora(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    scaling: float,
) -> Tensor:
    """Add scaling * sum_k w_k B_{e_k} A_{e_k} x to base, expert by expert.

    Half precision is computed in float32 and rounded once; float64 stays float64.

    Args:
        base: (T, O).
        x: (T, I).
        lora_a: (E, R, I).
        lora_b: (O, E, R).
        selected_experts: (T, K); anything outside [0, E) is an empty slot.
        routing_weights: (T, K).
        scaling: Multiplies the whole sum.

    Returns:
        (T, O) in the dtype of base.
    """
    compute = torch.promote_types(lora_a.dtype, torch.float32)
    total = base.to(torch.promote_types(base.dtype, compute))
    for slot in range(selected_experts.shape[1]):
        for expert in range(lora_a.shape[0]):
            token = (selected_experts[:, slot] == expert).nonzero().squeeze(1)
            middle = x[token].to(compute) @ lora_a[expert].to(compute).t()
            delta = middle @ lora_b[:, expert].to(compute).t()
            weight = scaling * routing_weights[token, slot].to(compute).unsqueeze(1)
            total = total.index_add(0, token, (weight * delta).to(total.dtype))
    return total.to(base.dtype)
