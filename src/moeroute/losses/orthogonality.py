"""Router rows that point in different directions.

    L = mean over pairs e != f of cos(R_e, R_f)^2

Source: the baseline of Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss,
2025, arXiv 2512.23447, which finds that it helps little; the square and the mean are our own
reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moeroute.losses.coupling import router_rows
from moeroute.ops.exact import without_autocast
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class OrthogonalityLoss:
    """Pushes the rows of a linear router apart; no token is needed.

    0 where all rows are orthogonal, which needs E <= H, and for one expert; 1 where all are
    parallel. Changing the length of a row changes nothing.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        rows: (E, H) of the router; the loss is a scalar, float32 or wider.

    Raises:
        ValueError: The router has no row an expert.
    """

    weight: float = 0.01

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        rows = router_rows(record.router, record.site)
        size = rows.shape[0]
        with without_autocast(rows.device.type):
            unit = functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)))
            cosines = (unit @ unit.T).square()
            return (cosines.sum() - cosines.diagonal().sum()) / max(size * (size - 1), 1)
