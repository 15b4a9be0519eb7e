"""A balance loss between experts of two kinds, of which the cheap ones should be fuller.

    L = E * sum_e eta_e f_e P_e,  eta_e = 1 for the first experts, cheapness for the others

Source: MoE++, Jin et al., 2024, arXiv 2410.07348, equation 7. Difference from the paper: f is a
share of the filled slots, as in `BalanceLoss`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.load import tokens_per_expert
from moeroute.ops.probs import softmax_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class KindsBalanceLoss:
    """The Switch balance loss, with another price for the experts after the first ones.

    At perfect balance the mean of eta: 1 with a cheapness of 1, where it is `BalanceLoss`. The
    gradient flows through P alone. Padding and empty slots are left out.

    Args:
        num_first: How many experts have a price of 1.
        cheapness: Price of the others; the lower, the more tokens they get.
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        router_logits: (T, E); selected_experts: (T, K); the loss is a scalar in the logits' dtype.
    """

    num_first: int
    cheapness: float = 0.75
    weight: float = 0.01

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing, token_mask = record.routing, record.token_mask
        size = routing.num_experts
        router_logits = real_tokens_only(routing.router_logits, token_mask)
        mean_probs = masked_mean(softmax_probs(router_logits), token_mask)  # (E,)
        counts = tokens_per_expert(routing.selected_experts, size, token_mask)
        load = counts / counts.sum().clamp(min=1)
        first = torch.arange(size, device=counts.device) < self.num_first
        return size * (torch.where(first, 1.0, self.cheapness) * load * mean_probs).sum()
