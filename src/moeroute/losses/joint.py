"""Losses of several layers at once, where the mean over layers stands inside the formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from moeroute.types import RoutingRecord


@runtime_checkable
class JointLoss(Protocol):
    """A loss that is asked once for all the layers that ask for it, not once for each."""

    @property
    def weight(self) -> float:
        """Coefficient of the loss in the total."""
        ...

    def __call__(self, record: RoutingRecord, /) -> Tensor:
        """Scalar, unweighted: of one layer as if it were alone."""
        ...

    def over(self, records: Sequence[RoutingRecord], /) -> Tensor:
        """Scalar, unweighted: of at least one layer, on whatever devices; on that of the first."""
        ...
