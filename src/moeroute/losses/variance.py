"""Routing that differs from token to token.

    L = 1 - (E^2 / (E - 1)) * mean over experts of the variance over tokens of p_te

Source: Advancing Expert Specialization for Better MoE, Guo et al., 2025, arXiv 2505.22323; from its
abstract, the variance over tokens and the scale are our own reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.probs import softmax_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class VarianceLoss:
    """Pushes tokens to be sure of different experts; goes with a balance loss.

    1 where all tokens have the same probabilities, whatever they are; 0 where each is sure of one
    expert and experts have the same load; 0 for a single expert and without real tokens. Padding is
    left out.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        probs: Logits to probabilities whose rows sum to 1; for sigmoid routers
            `moeroute.routers.normalized_sigmoid_probs`.

    Shapes:
        router_logits: (T, E); the loss is a scalar in their dtype.
    """

    weight: float = 1e-3
    probs: Callable[[Tensor], Tensor] = field(default=softmax_probs, repr=False)

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        mask = record.token_mask
        probs = self.probs(real_tokens_only(record.routing.router_logits, mask))
        size = probs.shape[-1]
        if size == 1:
            return probs.sum() * 0.0
        deviation = probs - masked_mean(probs, mask)
        variance = masked_mean(deviation.square(), mask).mean()
        tokens = probs.new_tensor(probs.shape[0]) if mask is None else mask.sum()
        lacking = 1.0 - size**2 / (size - 1) * variance
        return torch.where(tokens > 0, lacking, lacking * 0.0)
