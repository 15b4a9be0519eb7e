"""Shazeer's importance loss: the spread of the total weight that experts receive.

    L = CV(importance)^2,  importance_e = sum over tokens of w_te

Source: Outrageously Large Neural Networks, Shazeer et al., 2017, arXiv 1701.06538, equations 6-7.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeroute.losses.masked import masked_mean
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceLoss:
    """Pushes experts towards equal total routing weight. Padding is left out; 0 at perfect balance.

    Args:
        weight: Coefficient in the total. A total takes the mean over the layers that ask for this
            loss.
    """

    weight: float = 0.1

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing = record.routing
        size = routing.num_experts
        spread = routing.routing_weights.new_zeros(routing.routing_weights.shape[0], size + 1)
        spread = spread.scatter_add(1, routing.selected_experts, routing.routing_weights)
        importance = masked_mean(spread[:, :size], record.token_mask)  # (E,)
        mean = importance.mean()
        return importance.var(unbiased=False) / mean.square().clamp(min=1e-20)
