"""What routers are charged that have a unit of a layer executed for some tokens alone.

    sparsity  L = |(1 - s) - mean over units of mean over real tokens of g|
    change    L = mean over tokens with g = 0 of 1 - cos(u, u + F(u))

Source: Informed Routing in LLMs: Smarter Token-Level Computation for Faster Inference, Han et al.,
2025, arXiv 2510.13831; read from the official code. Differences from the
code: padding is left out of both. Our own reading: the change itself is measured and gets no
gradient, the mean over the tokens that are foretold has one through g.

Axes: T tokens, H features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moeroute.depth_types import DepthRecord
from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsityTargetLoss:
    """How far the share of executed tokens, over all units together, is from its target.

    0 where a share of `sparsity` of all pairs of token and unit is not executed, whichever they
    are; 0 without real tokens. Only the mean over units counts, so one may execute all and another
    none. Computed in float32.

    Args:
        sparsity: s, in [0, 1].
        weight: Coefficient in the total. Default of the code: 8.

    Shapes:
        routing_weights: (B, S) g of each unit; the loss is a scalar.

    Raises:
        ValueError: sparsity is out of range; in the call, a layer whose router draws no gates.
    """

    sparsity: float = 0.25
    weight: float = 8.0

    def __post_init__(self) -> None:
        """Check the target."""
        if not 0.0 <= self.sparsity <= 1.0:
            raise ValueError(f"sparsity={self.sparsity} is outside [0, 1]")

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one unit as if it were alone."""
        return self.over((record,))

    def over(self, records: Sequence[RoutingRecord]) -> Tensor:
        """The loss of all units: a scalar, unweighted."""
        shares = [masked_mean(_gate(record, self), record.token_mask) for record in records]
        share = torch.stack([each.to(shares[0].device) for each in shares]).mean()
        return _real_tokens(records[0]) * (1.0 - self.sparsity - share).abs()


@dataclass(frozen=True, kw_only=True, slots=True)
class ForetoldChangeLoss:
    """How much a unit would have turned the tokens for which it is not executed.

    0 where it would have left their direction alone and where every token is executed, at most 2.
    Padding is left out. Computed in float32.

    Args:
        weight: Coefficient in the total, which takes the mean over the units that ask for it.

    Shapes:
        routing_weights: (B, S) g; tokens, executed: (B, S, H); the loss is a scalar.

    Raises:
        ValueError: The layer's router draws no gates, or the unit was not computed for all tokens.
    """

    weight: float = 1.0

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one unit: a scalar, unweighted."""
        foretold = real_tokens_only(1.0 - _gate(record, self), record.token_mask)  # (T,)
        unit = record.unit if isinstance(record, DepthRecord) else None
        if unit is None:
            raise ValueError(
                f"{record.site}: ForetoldChangeLoss needs a unit that was computed for every "
                "token, such as ForecastUnit in training"
            )
        tokens = real_tokens_only(unit.tokens.detach().flatten(0, 1).float(), record.token_mask)
        added = real_tokens_only(unit.executed.detach().flatten(0, 1).float(), record.token_mask)
        change = 1.0 - cosine_similarity(tokens, tokens + added, dim=-1)  # (T,)
        count = foretold.sum()
        mean = (foretold * change).sum() / count.clamp(min=1.0)
        return torch.where(count > 0, mean, 0.0)


def _gate(record: RoutingRecord, loss: SparsityTargetLoss | ForetoldChangeLoss) -> Tensor:
    """(T,) float32 g."""
    depth = record.depth if isinstance(record, DepthRecord) else None
    if depth is None or depth.routing_weights is None:
        raise ValueError(
            f"{record.site}: {type(loss).__name__} needs a router that draws gates, such as "
            "UnitGateRouter while it learns"
        )
    return depth.routing_weights.flatten().float()


def _real_tokens(record: RoutingRecord) -> Tensor | float:
    """1 if there is a real token, else 0."""
    if record.token_mask is None:
        return float(record.routing.selected_experts.shape[0] > 0)
    return record.token_mask.any().float()
