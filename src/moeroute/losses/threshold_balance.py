"""The balance loss of routers with a threshold: load times mean distance from the threshold.

    L = E * sum_e f_e D_e
    f_e = share of the tokens with p_e >= tau,  D_e = mean over tokens of p_e - tau

Source: AdaMoLE, Liu and Luo, 2024, arXiv 2405.00361; read from the official code. As there, D runs
over all tokens, those below the threshold too, so that the loss can be negative.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.probs import softmax_probs
from moeroute.outputs import ThresholdOutput
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdBalanceLoss:
    """Pushes probabilities down, and thresholds up, at the experts that most tokens keep.

    0 without real tokens. The gradient flows through D alone, to the logits and the thresholds; f
    is counted. Padding is left out of both.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        router_logits: (T, E); thresholds: (T,); the loss is a scalar in the logits' dtype.

    Raises:
        ValueError: The router has no thresholds.
    """

    weight: float = 1e-3

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing, token_mask = record.routing, record.token_mask
        if not isinstance(routing, ThresholdOutput):
            raise ValueError(
                f"ThresholdBalanceLoss compares with thresholds, but the router of {record.site!r} "
                "has none; use BalanceLoss"
            )
        # masked before the softmax: NaN in a padding row would come back through its gradient
        router_logits = real_tokens_only(routing.router_logits, token_mask)
        thresholds = real_tokens_only(routing.thresholds, token_mask)
        distance = softmax_probs(router_logits) - thresholds.unsqueeze(1)  # (T, E)
        load = masked_mean((distance >= 0).to(distance.dtype), token_mask)  # (E,)
        return routing.num_experts * (load * masked_mean(distance, token_mask)).sum()
