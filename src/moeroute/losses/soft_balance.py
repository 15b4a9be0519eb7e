"""The balance loss of a soft mixture: the load is what the top-k would be.

    L = E * sum_e f_e P_e
    f_e = share of expert e in the top-k of each token,  P_e = mean over tokens of p_e

A mixture that gives every expert a slot loads all of them alike, whatever the weights; here the
load is counted over the slots that a sparse inference would fill.

Source: LoRA-Mixer, 2025, arXiv 2507.00029, read from reviews and notes of the paper. Differences
from them: the factor E, with which the value at perfect balance is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeroute.losses.balance import BalanceLoss
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftBalanceLoss:
    """`BalanceLoss` with the load of the top-k logits, whatever slots were filled.

    1 at perfect balance, E / K if all tokens give all probability to the same K experts; 0 without
    real tokens. Padding is left out; the gradient flows through P alone.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        top_k: K of the inference; more than E counts as E.

    Shapes:
        router_logits: (T, E); the loss is a scalar in the logits' dtype.
    """

    weight: float = 0.01
    top_k: int = 1

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        router_logits = record.routing.router_logits
        slots = min(self.top_k, router_logits.shape[-1])
        weights, chosen = torch.topk(router_logits.detach(), slots, dim=-1)
        chosen = chosen.masked_fill(torch.isneginf(weights), router_logits.shape[-1])  # absent
        routing = replace(record.routing, routing_weights=weights, selected_experts=chosen)
        return BalanceLoss()(replace(record, routing=routing))
