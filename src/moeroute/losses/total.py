"""Many losses of many layers to one number and its named parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.types import AuxLoss, RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class LossReport:
    """The auxiliary losses of one forward pass.

    Attributes:
        total: Scalar, the weighted sum of the parts, with a gradient.
        parts: Name -> scalar, each loss unweighted: its mean over the layers that ask for it. The
            name is the loss's class; where several losses of one class differ in a field, the later
            ones are named "BalanceLoss_2" and so on.
    """

    total: Tensor
    parts: dict[str, Tensor]


def total_loss(records: Iterable[RoutingRecord]) -> LossReport:
    """Sum over losses of weight * mean over the layers that ask for it.

    The mean keeps a coefficient's meaning when a model has more layers or an adapter more sites.
    Two losses are the same loss if they are equal, field by field. Layers may live on several
    devices; a loss is gathered on the device of its first layer.

    Args:
        records: One a routed layer.

    Returns:
        The total and its parts; a zero without gradient and no parts if nobody asks for a loss.
    """
    groups: list[tuple[AuxLoss, list[Tensor]]] = []
    for record in records:
        for loss in record.losses:
            values = next((known for other, known in groups if other == loss), None)
            if values is None:
                values = []
                groups.append((loss, values))
            values.append(loss(record))
    parts: dict[str, Tensor] = {}
    total: Tensor | None = None
    for loss, values in groups:
        mean = torch.stack([value.to(values[0].device) for value in values]).mean()
        parts[_free_name(type(loss).__name__, parts)] = mean
        weighted = loss.weight * mean
        total = weighted if total is None else total + weighted.to(total.device)
    return LossReport(total=torch.zeros(()) if total is None else total, parts=parts)


def _free_name(name: str, taken: dict[str, Tensor]) -> str:
    free, count = name, 2
    while free in taken:
        free, count = f"{name}_{count}", count + 1
    return free
