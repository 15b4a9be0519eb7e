"""How unsure a router is: entropies of probabilities as a fraction of their maximum.

Axes: T tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEAR_SHANNON = 1e-2


def tsallis_entropy(probs: Tensor, *, index: float, eps: float = 1e-5) -> Tensor:
    """Tsallis entropy of each row, divided by that of equal probabilities.

        H = (1 - sum_e (p_e + eps)^q) / (1 - E^(1 - q)),  Shannon's where q is within 0.01 of 1

    Because of eps a sure row is slightly below 0 and an even one slightly below 1 (-1.8e-4 and
    0.9996 for 8 experts and q = 1.1); the limit q = 1 is Shannon's entropy over ln E, taken
    early because eps / (q - 1) grows without bound.

    Args:
        probs: (..., E), float32 or wider, rows sum to 1.
        index: q, above 0.
        eps: Added to every probability.

    Returns:
        (...) in the dtype of probs, differentiable; 0 for a single expert.
    """
    size = probs.shape[-1]
    if size == 1:
        return torch.zeros_like(probs[..., 0])
    shifted = probs + eps
    if abs(index - 1.0) < NEAR_SHANNON:
        return -(shifted * shifted.log()).sum(-1) / math.log(size)
    return (1.0 - shifted.pow(index).sum(-1)) / (1.0 - size ** (1.0 - index))


def renyi_entropy(probs: Tensor, *, order: float) -> Tensor:
    """Renyi entropy of each row, divided by that of equal probabilities.

        H = ln(sum_e p_e^a) / ((1 - a) ln E),  Shannon's where a is within 0.01 of 1

    Args:
        probs: (..., E), float32 or wider, rows sum to 1.
        order: a, above 0.

    Returns:
        (...) in [0, 1], in the dtype of probs, differentiable where p > 0; 0 for a single expert.
    """
    size = probs.shape[-1]
    if size == 1:
        return torch.zeros_like(probs[..., 0])
    safe = probs.clamp(min=torch.finfo(probs.dtype).tiny)
    if abs(order - 1.0) < NEAR_SHANNON:
        return -(safe * safe.log()).sum(-1) / math.log(size)
    return safe.pow(order).sum(-1).log() / ((1.0 - order) * math.log(size))
