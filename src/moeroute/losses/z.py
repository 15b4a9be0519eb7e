"""The router z-loss: keeps logits small.

    L = mean over tokens of logsumexp(logits)^2

Source: ST-MoE, Zoph et al., 2022, arXiv 2202.08906, equation 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.losses.masked import masked_mean
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class ZLoss:
    """Penalises large router logits. Padding is left out; log(E)^2 when all logits are 0.

    Args:
        weight: Coefficient in the total. A total takes the mean over the layers that ask for this
            loss.
    """

    weight: float = 0.001

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        norm = torch.logsumexp(record.routing.router_logits, dim=-1)
        return masked_mean(norm.square(), record.token_mask)
