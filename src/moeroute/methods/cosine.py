"""Cosine routing: experts are directions in a space of few dimensions.

    s = W_p x,  z_e = |tau| * cos(s, C_e),  then softmax over all, top-k, renormalised if k > 1

Source: On the Representation Collapse of Sparse Mixture of Experts, Chi et al., 2022, arXiv
2204.09179 (X-MoE); read with Equifinality in Mixture of Experts, arXiv 2604.14419, of which the
space of 64 dimensions and the temperature are. Differences from the paper: X-MoE divides by a
temperature of 0.3 at first and takes half as many dimensions as experts; the equations are our own
reading of both. One hop only: more hops share the experts of a block and are no matter of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.routed_gate import RoutedGate
from moeroute.methods.checks import check_balance_weight
from moeroute.methods.gate_parts import (
    balance_losses,
    check_slots,
    own_router,
    own_scaling,
    scaled_as,
    slots_of,
)
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.cosine import CosineScore
from moeroute.routers.select import TopK
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind

NORMALIZE_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Cosine scores on the gate of an MoE block, or in a `MoELayer`.

    A fresh method does not keep the checkpoint's routing: its directions are new.

    Args:
        space_size: Dimensions that are compared. Default of the paper: 64; 0: those of the tokens.
        temperature: |tau| at first, the bound of the logits. It is trained.
        top_k: Slots per token. 1 <= top_k <= num_experts of a site; None for the checkpoint's.
        router_aux_loss_coef: Weight of the balance loss, 1.0 at perfect balance; 0 turns it off.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (T, E) float32 in [-|tau|, |tau|].
        routing_weights, selected_experts: (T, K); for K > 1 weights sum to 1 (times the
            checkpoint's routed_scaling_factor).

    Raises:
        ValueError: A field is out of range, or top_k exceeds the experts of a site.

    Cost: a product with (space_size, H) and one with (E, space_size). Adds
        space_size * (H + E) + 1 parameters a gate.
    Trains: router. Inference: supported.

    Example:
        >>> wrapped = moeroute.wrap_model(model, Cosine(space_size=64))
    """

    paper: ClassVar[Paper] = Paper(
        title="On the Representation Collapse of Sparse Mixture of Experts",
        arxiv="2204.09179",
        year=2022,
    )
    site_kind: ClassVar[SiteKind] = "gate"

    space_size: int = 64
    temperature: float = 10.0
    top_k: int | None = None
    router_aux_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_slots(self)
        check_balance_weight(self)
        if self.space_size < 0:
            raise ValueError(f"Cosine: space_size={self.space_size} is below 0")
        if self.temperature <= 0:
            raise ValueError(f"Cosine: temperature={self.temperature} is not above 0")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Gates share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> RoutedGate:
        """A fresh cosine router for the gate."""
        slots, scaling = slots_of(self, site), own_scaling(site)
        router = self._compose(site.in_features, site.out_features, slots, scaling)
        router.select = scaled_as(own_router(site).select, router.select)
        return RoutedGate.at(site, router, self.losses())

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A fresh router for a layer of one's own; top_k is 2 where the method has None."""
        return self._compose(in_features, num_experts, self.top_k or 2, 1.0)

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged."""
        return balance_losses(self.router_aux_loss_coef)

    def _compose(
        self, in_features: int, num_experts: int, slots: int, scaling: float
    ) -> ComposedRouter:
        score = CosineScore(
            in_features,
            num_experts,
            space_size=self.space_size,
            temperature=self.temperature,
        )
        select = TopK(
            slots,
            normalize=slots > 1,  # one weight over itself would have no gradient
            normalize_eps=NORMALIZE_EPS,
            routed_scaling_factor=scaling,
        )
        return ComposedRouter(score, select)
