"""Many losses of many layers to one number and its named parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.losses.joint import JointLoss
from moeroute.types import AuxLoss, RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class LossReport:
    """The auxiliary losses of one forward pass.

    Attributes:
        total: Scalar, the weighted sum of the parts, with a gradient.
        parts: Name -> scalar, each loss unweighted: its mean over the layers that ask for it, or
            what a `JointLoss` says of them together. The name is the loss's class; where several
            losses of one class differ in a field, the later ones are named "BalanceLoss_2" and so
            on.
    """

    total: Tensor
    parts: dict[str, Tensor]


def total_loss(records: Iterable[RoutingRecord]) -> LossReport:
    """Sum over losses of weight * mean over the layers that ask for it.

    A `JointLoss` is asked once, for all of its layers. The mean keeps a coefficient's meaning when
    a model has more layers or an adapter more sites. Two losses are the same loss if they are
    equal, field by field. Layers may live on several devices; a loss is gathered on the device of
    its first layer.

    Args:
        records: One a routed layer.

    Returns:
        The total and its parts; a zero without gradient and no parts if nobody asks for a loss.
    """
    groups: list[tuple[AuxLoss, list[RoutingRecord]]] = []
    for record in records:
        for loss in record.losses:
            asking = next((known for other, known in groups if other == loss), None)
            if asking is None:
                asking = []
                groups.append((loss, asking))
            asking.append(record)
    parts: dict[str, Tensor] = {}
    total: Tensor | None = None
    for loss, asking in groups:
        value = loss.over(asking) if isinstance(loss, JointLoss) else _mean(loss, asking)
        parts[_free_name(type(loss).__name__, parts)] = value
        weighted = loss.weight * value
        total = weighted if total is None else total + weighted.to(total.device)
    return LossReport(total=torch.zeros(()) if total is None else total, parts=parts)


def _mean(loss: AuxLoss, records: list[RoutingRecord]) -> Tensor:
    values = [loss(record) for record in records]
    return torch.stack([value.to(values[0].device) for value in values]).mean()


def _free_name(name: str, taken: dict[str, Tensor]) -> str:
    free, count = name, 2
    while free in taken:
        free, count = f"{name}_{count}", count + 1
    return free
