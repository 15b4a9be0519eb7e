"""Answers of routers that say more than who was chosen, for the losses that read it.

Axes: B samples, T tokens, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeroute.types import RouterOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class ThresholdOutput(RouterOutput):
    """What a router says that compares probabilities with a threshold of each token.

    Attributes:
        thresholds: (T,) in the logits' dtype, with a gradient; what losses compare with.
    """

    thresholds: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastOutput(RouterOutput):
    """A routing with what the router says of whole samples.

    Attributes:
        features: (B, E) in the logits' dtype, with a gradient.
        momentum_features: (B, E) by the momentum score, without a gradient.
    """

    features: Tensor
    momentum_features: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilOutput(RouterOutput):
    """A routing with what one block learns from another, on the same tokens.

    Attributes:
        taught: (T, H) what the learning block answers, with a gradient.
        target: (T, H) what it is to answer, without a gradient.
    """

    taught: Tensor
    target: Tensor
