"""A contrastive loss between two samples of the same task.

    G1 = q[:B/2] W k[B/2:]^T,  G2 = q[B/2:] W k[:B/2]^T
    L  = (CE(G1, i) + CE(G2, i)) / 2

Source: Mixture-of-Experts Meets In-Context Reinforcement Learning, Wu et al., 2025, arXiv
2506.05426 (T2MIR); read from the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from moeroute.ops.exact import without_autocast
from moeroute.outputs import ContrastOutput
from moeroute.types import RoutingRecord


@runtime_checkable
class HasBilinear(Protocol):
    """A router that compares features."""

    bilinear: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SamePairLoss:
    """Lets the routing of a sample be told from its partner's, sample i + B/2 of the batch.

    The batch holds B/2 tasks, two samples each, in that order. 0 for one pair, ln(B/2) where
    nothing tells tasks apart (W = 0), near 0 at perfect telling. The gradient flows through the
    features and W; the momentum features have none.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        features, momentum_features: (B, F); bilinear: (F, F); the loss is a scalar.

    Raises:
        ValueError: The layer's router gives no features, or the batch has an odd number of samples.
    """

    weight: float = 0.01

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing = record.routing
        parts = [] if record.router is None else list(record.router.modules())
        bilinear = next((part.bilinear for part in parts if isinstance(part, HasBilinear)), None)
        if not isinstance(routing, ContrastOutput) or bilinear is None:
            raise ValueError(
                f"{record.site}: SamePairLoss needs a router that compares samples, such as "
                "MomentumRouter"
            )
        queries, keys = routing.features, routing.momentum_features.detach()
        if queries.shape[0] % 2:
            raise ValueError(
                f"{record.site}: SamePairLoss got {queries.shape[0]} samples; give B/2 tasks with "
                "two samples each, sample i and sample i + B/2 of one task, or turn the loss off"
            )
        half = queries.shape[0] // 2
        if not half:
            return queries.sum() * 0.0
        with without_autocast(queries.device.type):
            compared = queries @ bilinear.to(queries)
            between = compared[:half] @ keys[half:].T, compared[half:] @ keys[:half].T
        labels = torch.arange(half, device=queries.device)
        first, second = (functional.cross_entropy(each, labels) for each in between)
        return (first + second) / 2
