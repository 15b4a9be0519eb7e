"""Many losses of many layers to one number and its named parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.types import AuxLoss, RoutingRecord


@dataclass(frozen=True, slots=True)
class LossReport:
    """The auxiliary losses of one forward pass.

    Attributes:
        total: Scalar, the weighted sum of the parts.
        parts: Loss name -> scalar, unweighted mean over the layers that ask for it.
    """

    total: Tensor
    parts: dict[str, Tensor]


def total_loss(records: Iterable[RoutingRecord]) -> LossReport:
    """Sum over losses of weight * mean over the layers that ask for it.

    The mean over layers keeps a coefficient's meaning when a model has more layers, or an adapter
    more sites. Two losses that differ in any field count as two, the second named `NAME_2`.

    Args:
        records: One a routed layer. None at all gives a total of 0.
    """
    by_loss: dict[AuxLoss, list[Tensor]] = {}
    for record in records:
        for loss in record.losses:
            by_loss.setdefault(loss, []).append(loss(record))
    parts: dict[str, Tensor] = {}
    total: Tensor | None = None
    for loss, values in by_loss.items():
        device = values[0].device
        mean = torch.stack([value.to(device) for value in values]).mean()
        parts[_free_name(type(loss).__name__, parts)] = mean
        weighted = loss.weight * mean
        total = weighted if total is None else total + weighted.to(total.device)
    return LossReport(torch.zeros(()) if total is None else total, parts)


def _free_name(name: str, taken: dict[str, Tensor]) -> str:
    count = 2
    free = name
    while free in taken:
        free, count = f"{name}_{count}", count + 1
    return free
