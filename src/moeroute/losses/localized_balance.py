"""The localized balance loss: even use within a group of experts, a set unevenness between groups.

    v_ne = Z_ne * (1 + delta if expert e is of the group of sample n's type, else 1 - delta)
    L    = var(v) / mean(v)^2 over all samples and experts
    Z_ne = mean over the tokens of sample n of w_te

Source: LoRAMoE, Dou et al., 2023, arXiv 2312.09979; read from the official code. Differences from
the code: Z is a mean over real tokens, where the code sums over padding too, so that a sample's
length does not matter; samples without real tokens are left out. The factors are the paper's:
being even in v asks a sample to use the group of its own type less, (1 - delta) / (1 + delta) times
as much as the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.losses.masked import real_tokens_only
from moeroute.ops.gates import expert_table
from moeroute.ops.task_ids import check_task_range
from moeroute.types import RoutingRecord

EPS = 1e-10
NUM_TYPES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalizedBalanceLoss:
    """Balances experts within a group, and moves a sample from one group to the other by delta.

    0 where all v are equal and without real tokens. Samples of type 1 belong to the first half of
    the experts, those of type 0 to the second. The gradient flows through the routing weights.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        delta: In [0, 1); 0 is an ordinary balance of importance that looks at no types.

    Shapes:
        routing_weights, selected_experts: (T, K); task_ids: (B,), the types 0 and 1; the loss is a
            scalar in the weights' dtype.

    Raises:
        ValueError: Delta is not 0 and the record holds no task_ids, one that is neither 0 nor 1,
            or not one a sample.
    """

    weight: float = 0.1
    delta: float = 0.1

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        importance, real = _importance(record)  # (B, E), (B, 1)
        size = importance.shape[1]
        values = importance * self._factors(record, importance)
        count = real.sum() * size
        mean = values.sum() / count.clamp(min=1)
        spread = (values - mean).masked_fill(~real, 0.0).square().sum()
        return spread / (count - 1).clamp(min=1) / (mean.square() + EPS)

    def _factors(self, record: RoutingRecord, importance: Tensor) -> Tensor:
        """(B, E), or one number for all."""
        if not self.delta:
            return importance.new_ones(())
        types, (samples, size) = record.task_ids, importance.shape
        if types is None or types.shape != (samples,):
            given = "none" if types is None else f"{tuple(types.shape)}"
            raise ValueError(
                f"LocalizedBalanceLoss needs task_ids, one for each of {samples} samples, 1 for "
                f"the first half of the experts and 0 for the second, but got {given}. Call "
                "model(..., task_ids=types), or set delta=0"
            )
        check_task_range(types, NUM_TYPES, "LocalizedBalanceLoss")
        first = torch.arange(size, device=importance.device) < size // 2  # (E,)
        own = (types.to(importance.device) == 1).unsqueeze(1) == first  # (B, E)
        return 1.0 + self.delta * (2.0 * own.to(importance.dtype) - 1.0)


def _importance(record: RoutingRecord) -> tuple[Tensor, Tensor]:
    """(B, E) mean weights over each sample's real tokens, 0 without, and (B, 1) who has some."""
    routing = record.routing
    table = expert_table(routing.selected_experts, routing.routing_weights, routing.num_experts)
    tokens = table.shape[0]
    shape = record.sequence_shape or (1, tokens)
    mask = record.token_mask
    real = table.new_ones(tokens, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    lengths = real.reshape(shape).sum(1, keepdim=True)  # (B, 1)
    total = real_tokens_only(table, mask).reshape(*shape, table.shape[1]).sum(1)
    return total / lengths.clamp(min=1), lengths > 0
