"""Shazeer's importance loss: the spread of the total weight that experts receive.

    L = CV(importance)^2 = var / mean^2,  importance_e = sum over tokens of w_te

Source: Outrageously Large Neural Networks, Shazeer et al., 2017, arXiv 1701.06538, equations 6-7.
Differences from the paper: the variance is over E, not E - 1, so that one expert gives 0. The
paper's second loss, on a smooth estimator of the load, is not part of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeroute.losses.masked import masked_mean
from moeroute.ops.gates import expert_table
from moeroute.types import RoutingRecord

EPS = 1e-10


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceLoss:
    """Pushes experts towards equal total routing weight.

    0 at perfect balance and without real tokens, E - 1 if one expert takes all. The gradient flows
    through the routing weights. Padding and empty slots are left out.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        routing_weights, selected_experts: (T, K); the loss is a scalar in the weights' dtype.
    """

    weight: float = 0.1

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing = record.routing
        table = expert_table(
            routing.selected_experts, routing.routing_weights, routing.num_experts
        )  # (T, E)
        importance = masked_mean(table, record.token_mask)
        spread = (importance - importance.mean()).square().mean()
        return spread / (importance.mean().square() + EPS)
