"""The preserve loss: what experts were before they are trained on.

    L = sum over the experts' weights of (theta - theta_0)^2

Source: LoRA-Mixer, 2025, arXiv 2507.00029, read from reviews and notes of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from moeroute.types import RoutingRecord


@runtime_checkable
class RemembersStart(Protocol):
    """Experts that know what they were."""

    def drift(self) -> Tensor:
        """The sum of squares of what changed, a scalar."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PreserveLoss:
    """Pulls experts that exist already back to what they were.

    0 at the start. It looks at weights alone, so padding and routing do not matter.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        The loss is a scalar in the experts' dtype.

    Raises:
        ValueError: The layer's experts do not remember their start.
    """

    weight: float = 1e-4

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        if not isinstance(record.experts, RemembersStart):
            raise ValueError(
                f"{record.site}: PreserveLoss needs experts that remember their start, but got "
                f"{type(record.experts).__name__}; use RaggedLoRABank(..., anchored=True)"
            )
        return record.experts.drift()
