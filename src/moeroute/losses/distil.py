"""Teaches a small block what a big one answers, layer by layer.

L = mean over real tokens and features of (small(u) - big(u))^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.outputs import DistilOutput
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilLoss:
    """The mean squared error of an answer against another one, which is a target.

    0 where they agree and without real tokens. Padding is left out. Computed in float32 or wider;
    the target gets no gradient.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        taught, target: (T, H); the loss is a scalar.

    Raises:
        ValueError: The layer teaches nothing.
    """

    weight: float = 1.0

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing = record.routing
        if not isinstance(routing, DistilOutput):
            raise ValueError(
                f"{record.site}: DistilLoss needs a layer that teaches one block by another, such "
                "as WidthFeedForward while its small one learns"
            )
        wide = torch.promote_types(routing.taught.dtype, torch.float32)
        taught = real_tokens_only(routing.taught.to(wide), record.token_mask)
        target = real_tokens_only(routing.target.detach().to(wide), record.token_mask)
        return masked_mean((taught - target).square().mean(-1), record.token_mask)
