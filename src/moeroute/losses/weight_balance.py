"""A balance loss whose load is the routing weight that experts receive.

    L = E * sum_e W_e P_e
    W_e = mean over tokens of w_te,  P_e = mean over tokens of p_te

Source: DynMoLE, 2025, arXiv 2504.00661; read from the official code. Differences from the code: the
product is taken layer by layer, not once over the tokens of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.gates import expert_table
from moeroute.ops.probs import softmax_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBalanceLoss:
    """As the Switch balance loss, with routing weights in place of counts.

    1 at perfect balance if all experts weigh their probability, less where some are left out
    without renormalising; E if one expert takes all; 0 without real tokens. The gradient flows
    through both factors. Padding and empty slots are left out.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        router_logits: (T, E); routing_weights, selected_experts: (T, K); the loss is a scalar in
            the logits' dtype.
    """

    weight: float = 1e-3

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing, token_mask = record.routing, record.token_mask
        size = routing.num_experts
        # masked before the softmax: NaN in a padding row would come back through its gradient
        router_logits = real_tokens_only(routing.router_logits, token_mask)
        table = expert_table(routing.selected_experts, routing.routing_weights, size)  # (T, E)
        mean_weights = masked_mean(table, token_mask)
        return size * (mean_weights * masked_mean(softmax_probs(router_logits), token_mask)).sum()
