"""Top-p routing: a token gets the fewest experts whose probabilities reach p together.

    p = softmax(W x), highest first;  kept: until the sum reaches top_p;  w = p of the kept
    L = c_balance * E sum_e f_e P_e + c_entropy * mean H(p) / ln E

Source: Harder Tasks Need More Experts: Dynamic Routing in MoE Models, Huang et al., 2024, arXiv
2403.07652, section 2; the paper was not read here, equations and defaults are our own reading.
Differences from the paper: the entropy is a fraction of its maximum, so that the coefficient does
not depend on the number of experts, and both losses are averaged over layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.routed_gate import RoutedGate
from moeroute.losses.entropy import EntropyLoss
from moeroute.methods.checks import check_balance_weight
from moeroute.methods.gate_parts import balance_losses, own_router, scaled_as
from moeroute.routers.by_probability import TopP as Select
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class TopP:
    """A number of experts that follows the router's doubt, on the gate of an MoE block.

    A fresh method does not keep the checkpoint's routing: it starts from its rows, and chooses more
    experts for tokens of which the router is unsure. The entropy loss keeps it from taking them
    all.

    Args:
        top_p: In (0, 1]. Default of the paper: 0.4.
        max_slots: The most experts a token may have; None: all.
        normalize: Divide each token's weights by their sum, as checkpoints such as Mixtral do.
        router_aux_loss_coef: Weight of the balance loss, 1.0 at perfect balance; 0 turns it off.
        entropy_loss_coef: Weight of the entropy, 1.0 where all experts are equally likely.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K), highest first, then empty slots; K is max_slots,
            or E.

    Raises:
        ValueError: A field is out of range, or max_slots exceeds the experts of a site.

    Cost: one product with (E, H) and a sort of E. Adds E * H parameters a gate.
    Trains: router. Inference: supported.

    Example:
        >>> wrapped = moeroute.wrap_model(model, TopP(top_p=0.4, max_slots=8))
    """

    paper: ClassVar[Paper] = Paper(
        title="Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
        arxiv="2403.07652",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "gate"

    top_p: float = 0.4
    max_slots: int | None = None
    normalize: bool = False
    router_aux_loss_coef: float = 0.01
    entropy_loss_coef: float = 1e-4

    def __post_init__(self) -> None:
        """Check every field."""
        check_balance_weight(self)
        Select(self.top_p, max_slots=self.max_slots)
        if self.max_slots is not None and self.max_slots < 1:
            raise ValueError(f"TopP: max_slots={self.max_slots} is below 1; None is no limit")
        if self.entropy_loss_coef < 0:
            raise ValueError(
                f"TopP: entropy_loss_coef={self.entropy_loss_coef} would reward doubt; use 0 or "
                "more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Gates share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> RoutedGate:
        """The checkpoint's own score, whose softmax chooses."""
        own = own_router(site)
        router = ComposedRouter(own.score, self._select())
        router.select = scaled_as(own.select, router.select)
        return RoutedGate.at(site, router, self.losses())

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A fresh router for a layer of one's own."""
        return ComposedRouter(LinearScore(in_features, num_experts), self._select())

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged."""
        entropy = EntropyLoss(weight=self.entropy_loss_coef, index=1.0)
        return (
            *balance_losses(self.router_aux_loss_coef),
            *((entropy,) if self.entropy_loss_coef else ()),
        )

    def _select(self) -> Select:
        return Select(self.top_p, max_slots=self.max_slots, normalize=self.normalize)
