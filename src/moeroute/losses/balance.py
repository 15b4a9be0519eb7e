"""The Switch balance loss: load times mean probability.

    L = E * sum_e f_e P_e
    f_e = share of the filled slots that chose expert e,  P_e = mean over tokens of p_e

Source: Switch Transformers, Fedus et al., 2021, arXiv 2101.03961, equations 4-6. Differences from
the paper: K slots a token instead of one, with f a share of all slots, so that the value at perfect
balance is 1 for every K. For one layer transformers' `load_balancing_loss_func` is K times this: a
recipe's `router_aux_loss_coef` of c there is a weight of c * K here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.load import tokens_per_expert
from moeroute.ops.probs import softmax_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceLoss:
    """Pushes the router's mean probabilities away from the experts that are fullest.

    1 at perfect balance, E / K if all tokens go to the same K experts with all their probability; 0
    without real tokens. The gradient flows through P alone; f is counted. Padding and empty slots
    are left out of both.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        probs: Logits to probabilities whose rows sum to 1; for sigmoid routers
            `moeroute.routers.normalized_sigmoid_probs`.

    Shapes:
        router_logits: (T, E); selected_experts: (T, K); the loss is a scalar in the logits' dtype.
    """

    weight: float = 0.01
    probs: Callable[[Tensor], Tensor] = field(default=softmax_probs, repr=False)

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing, token_mask = record.routing, record.token_mask
        size = routing.num_experts
        # masked before the softmax: NaN in a padding row would come back through its gradient
        router_logits = real_tokens_only(routing.router_logits, token_mask)
        mean_probs = masked_mean(self.probs(router_logits), token_mask)  # (E,)
        counts = tokens_per_expert(routing.selected_experts, size, token_mask)
        load = counts / counts.sum().clamp(min=1)  # (E,)
        return size * (load * mean_probs).sum()
