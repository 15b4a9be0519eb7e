"""Teaches forecasters what the units of a decoder layer answer.

    L = mean over real tokens and features of SmoothL1(LFF(u), F(u)), beta 1

Source: Informed Routing in LLMs: Smarter Token-Level Computation for Faster Inference, Han et al.,
2025, arXiv 2510.13831; read from the official code. Difference from the
code: it sums over units, the total here takes their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from moeroute.depth_types import DepthRecord
from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastLoss:
    """How far a forecast is from what the unit answered; 0 where they agree.

    Computed in float32. The answer is a target and gets no gradient. Padding is left out; 0 without
    real tokens.

    Args:
        weight: Coefficient in the total, which takes the mean over the units that ask for it.

    Shapes:
        forecast, executed: (B, S, H); the loss is a scalar.

    Raises:
        ValueError: The layer has no forecaster that learns.
    """

    weight: float = 1.0

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one unit: a scalar, unweighted."""
        unit = record.unit if isinstance(record, DepthRecord) else None
        if unit is None or unit.forecast is None:
            raise ValueError(
                f"{record.site}: ForecastLoss needs a unit whose forecaster learns, such as "
                "ForecastUnit in training"
            )
        forecast = real_tokens_only(unit.forecast.flatten(0, 1).float(), record.token_mask)
        target = real_tokens_only(unit.executed.detach().flatten(0, 1).float(), record.token_mask)
        each = smooth_l1_loss(forecast, target, reduction="none").mean(-1)  # (T,)
        return masked_mean(each, record.token_mask)
