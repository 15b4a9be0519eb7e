"""Holds the share of one expert, over all layers together, at a budget.

    L = (mean over layers and real tokens of w_te - budget)^2

Source: Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models, 2024, arXiv
2410.10846, where e is the big feed-forward block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.losses.masked import real_tokens_only
from moeroute.ops.gates import expert_table
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetLoss:
    """How far an expert's mean weight is from its budget; one number for all layers.

    0 at the budget, however the weight is shared out over layers and tokens, and without real
    tokens. Padding is left out. The gradient flows through the weights.

    Args:
        budget: In [0, 1].
        expert: Whose weight is meant.
        weight: Coefficient in the total. Our own: 1, the paper names none.

    Shapes:
        routing_weights, selected_experts: (T, K) of each layer; the loss is a scalar in the
            weights' dtype.

    Raises:
        ValueError: The budget is out of range; in the call, a layer has no such expert.
    """

    budget: float = 0.5
    expert: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the budget."""
        if not 0.0 <= self.budget <= 1.0:
            raise ValueError(f"BudgetLoss: budget={self.budget} is outside [0, 1]")

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer as if it were alone."""
        return self.over((record,))

    def over(self, records: Sequence[RoutingRecord]) -> Tensor:
        """The loss of all layers: a scalar, unweighted."""
        sums = [self._sum(record) for record in records]
        counts = [_count(record) for record in records]
        device = sums[0].device
        total = torch.stack([each.to(device) for each in sums]).sum()
        count = torch.stack([each.to(device) for each in counts]).sum()
        distance = total / count.clamp(min=1) - self.budget
        return torch.where(count > 0, distance.square(), 0.0)

    def _sum(self, record: RoutingRecord) -> Tensor:
        routing = record.routing
        if not 0 <= self.expert < routing.num_experts:
            raise ValueError(
                f"{record.site}: BudgetLoss is of expert {self.expert}, but the layer has "
                f"{routing.num_experts}"
            )
        weights = real_tokens_only(routing.routing_weights, record.token_mask)
        table = expert_table(routing.selected_experts, weights, routing.num_experts)
        return table[:, self.expert].sum()


def _count(record: RoutingRecord) -> Tensor:
    """() int64 real tokens."""
    if record.token_mask is not None:
        return record.token_mask.sum()
    weights = record.routing.routing_weights
    return torch.full((), weights.shape[0], dtype=torch.int64, device=weights.device)
