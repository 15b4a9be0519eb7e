"""The expert-router coupling loss: each expert answers most to its own row of the router.

See `moeroute.ops.coupling.coupling_loss` for the formula.

Source: Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss (ERC), 2025, arXiv
2512.23447. The paper does not say whether layers are summed or averaged; like all losses here it is
averaged (for a sum, multiply the weight by the number of layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from moeroute.ops.coupling import coupling_loss, draw_proxies
from moeroute.types import RoutingRecord


@runtime_checkable
class HasGateWeights(Protocol):
    """Experts that show the matrix that their tokens meet first."""

    def gate_weights(self) -> Tensor:
        """(E, D, H), with its gradient; of gated experts the gate half."""
        ...


@runtime_checkable
class HasScore(Protocol):
    """A router, or a score around another one."""

    score: nn.Module


@runtime_checkable
class HasRows(Protocol):
    """A score with one row an expert."""

    weight: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ERCLoss:
    """Couples the rows of a linear router with the first matrices of the experts.

    It looks at weights alone: its cost does not depend on the tokens, padding does not matter, and
    it balances nothing (use it beside `BalanceLoss`). 0 if every expert answers more to its own
    proxy than `1 / alpha` of what anything else answers; there is no value "at balance". The
    gradient reaches the router's rows and the experts' gates, nothing else.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it. The
            paper's: 1.
        alpha: How much less an expert must answer to another's proxy. The paper's: 1 for 64
            experts, 0.5 for 256.
        noise: Whether proxies are drawn around the rows, anew for each layer and step and the same
            on all ranks. Without, the loss is deterministic (and teaches much less).

    Shapes:
        rows: (E, H); gate weights: (E, D, H); the loss is a scalar in float32, or float64.

    Raises:
        ValueError: The layer's router has no row an expert, or its experts do not show their gate.
    """

    weight: float = 1.0
    alpha: float = 1.0
    noise: bool = True

    def __post_init__(self) -> None:
        """Check alpha."""
        if self.alpha < 0:
            raise ValueError(f"ERCLoss: alpha={self.alpha} is below 0; use 0 to 1")

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        rows = router_rows(record.router, record.site)
        experts = record.experts
        if not isinstance(experts, HasGateWeights):
            raise ValueError(
                f"{record.site}: the coupling loss needs experts with gate_weights(), such as "
                f"SwiGLUExperts or MLPExperts, but got {type(experts).__name__}; for the experts "
                "of a checkpoint use moeroute.add_coupling_loss(model)"
            )
        draw = draw_proxies(rows) if self.noise else None
        return coupling_loss(rows, experts.gate_weights(), alpha=self.alpha, draw=draw)


def router_rows(router: nn.Module | None, site: str) -> Tensor:
    """The (E, H) rows of a router whose score is linear.

    Raises:
        ValueError: It has none.
    """
    score = router
    while isinstance(score, HasScore) and not isinstance(score, HasRows):
        score = score.score
    if not isinstance(score, HasRows) or score.weight.ndim != 2:
        raise ValueError(
            f"{site}: the loss needs a router with one row an expert, such as one with a "
            f"LinearScore, but got {type(router).__name__}"
        )
    return score.weight
