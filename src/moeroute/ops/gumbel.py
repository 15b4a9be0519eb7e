"""Samples of a categorical distribution that a gradient passes through.

Axes: A choices.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hard_gumbel_softmax(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """One-hot draws: y = softmax((logits + g) / temperature), forward its argmax, backward y.

    The values are exactly 0 and 1; the gradient is that of y.

    Source: Categorical Reparameterization with Gumbel-Softmax, Jang et al., 2016, arXiv 1611.01144,
    section 2.2.

    Args:
        logits: (..., A) float32 or float64.
        temperature: Above 0; the higher, the more even the gradient.

    Returns:
        (..., A) in the logits' dtype.
    """
    waits = torch.empty_like(logits).exponential_().clamp(min=torch.finfo(logits.dtype).tiny)
    soft = ((logits - waits.log()) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())
