"""The L1 of ReMoE: the weights of active experts, more where the load is more.

    L = coefficient * E / (slots * T^2) * sum_e (sum_t w_te) * c_e

Source: ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, Wang et al., 2024, arXiv
2412.14711, equations 6-10. The paper sums over layers; the total here takes their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from moeroute.losses.masked import real_tokens_only
from moeroute.ops.gates import expert_table
from moeroute.ops.load import tokens_per_expert
from moeroute.types import RoutingRecord


@runtime_checkable
class SteersDensity(Protocol):
    """A part of a router that keeps the coefficient of this loss."""

    coefficient: Tensor
    slots: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ActiveWeightLoss:
    """Pushes the weights of active experts down, as hard as the router's density asks for.

    With every expert at a load of slots * T / E and a mean weight of m over its tokens it is
    coefficient * m * slots; 0 without real tokens or where nobody is active. The gradient of
    active experts is positive, larger at the fuller expert; counts carry none. Padding and empty
    slots are left out.

    Args:
        weight: A further coefficient in the total, which takes the mean over the layers that ask.

    Shapes:
        routing_weights, selected_experts: (T, K); the loss is a scalar in the weights' dtype.

    Raises:
        ValueError: No part of the layer's router steers a density.
    """

    weight: float = 1.0

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, multiplied by the router's own coefficient."""
        control = _control_of(record)
        routing, mask = record.routing, record.token_mask
        size = routing.num_experts
        weights = real_tokens_only(routing.routing_weights, mask)
        sums = expert_table(routing.selected_experts, weights, size).sum(0)  # (E,)
        counts = tokens_per_expert(routing.selected_experts, size, mask)
        tokens = max(weights.shape[0], 1) if mask is None else mask.sum().clamp(min=1)
        scale = control.coefficient.to(sums) * size / control.slots
        return scale * ((sums / tokens) * (counts / tokens)).sum()


def _control_of(record: RoutingRecord) -> SteersDensity:
    for part in [] if record.router is None else record.router.modules():
        if isinstance(part, SteersDensity):
            return part
    raise ValueError(
        f"{record.site}: ActiveWeightLoss needs a router that steers its density; give it the "
        "selection moeroute.routers.DensityControl(Positive(), slots)"
    )
