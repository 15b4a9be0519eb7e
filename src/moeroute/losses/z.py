"""The router z-loss: keeps logits small.

    L = mean over tokens of logsumexp(logits)^2

Source: ST-MoE, Zoph et al., 2022, arXiv 2202.08906, equation 5. Differences from the paper: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class ZLoss:
    """Penalises large router logits, and pins the one direction that routing does not see.

    (ln E)^2 when all logits are 0; 0 at logits of -ln E, and without real tokens. Padding is left
    out.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        router_logits: (T, E); the loss is a scalar in their dtype.
    """

    weight: float = 0.001

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        router_logits = real_tokens_only(record.routing.router_logits, record.token_mask)
        norm = torch.logsumexp(router_logits, dim=-1)
        return masked_mean(norm.square(), record.token_mask)
