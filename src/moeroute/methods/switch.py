"""Switch: one expert a token, weighted by its probability.

    p = softmax(W (x * noise)),  noise ~ U(1 - j, 1 + j) in training, seen by the router alone
    e = the k highest of p;  w = p[e], not renormalised
    L = c_balance * E * sum_e f_e P_e + c_z * mean logsumexp(logits)^2

Source: Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient
Sparsity, Fedus et al., 2021, arXiv 2101.03961, equations 1-6; the z-loss is ST-MoE's. Differences
from the paper: no capacity, so that no token is dropped; more than one slot is allowed; the balance
loss is averaged over layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.routed_gate import RoutedGate
from moeroute.losses.z import ZLoss
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
from moeroute.routers.jitter import JitteredScore
from moeroute.routers.scores import LinearScore, Score
from moeroute.routers.select import TopK
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Softmax top-1 on the gate of an MoE block, or in a `MoELayer`.

    A fresh method starts from the checkpoint's own rows: it keeps the first of the experts that the
    checkpoint chooses by softmax, with that expert's probability as the weight.

    Args:
        top_k: Slots per token. 1 <= top_k <= num_experts of the site; None for the checkpoint's.
        router_jitter_noise: j, half the width of the noise on the router's input in training.
        router_aux_loss_coef: Weight of the balance loss, 1.0 at perfect balance; 0 turns it off.
        router_z_loss_coef: Weight of the z-loss; 0 turns it off.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K); weights sum to at most 1 (times the checkpoint's
            routed_scaling_factor).

    Raises:
        ValueError: A field is out of range, or top_k exceeds the experts of a site.

    Cost: one product with (E, H). Adds E * H parameters a gate.
    Trains: router. Inference: supported.

    Example:
        >>> wrapped = moeroute.wrap_model(model, Switch())
        >>> layer = MoELayer(router=Switch().router(64, 8), experts=SwiGLUExperts(8, 64, 128),
        ...                  losses=Switch().losses())
    """

    paper: ClassVar[Paper] = Paper(
        title="Switch Transformers: Scaling to Trillion Parameter Models with Simple and "
        "Efficient Sparsity",
        arxiv="2101.03961",
        year=2021,
    )
    site_kind: ClassVar[SiteKind] = "gate"

    top_k: int | None = 1
    router_jitter_noise: float = 0.01
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        """Check every field."""
        check_slots(self)
        check_balance_weight(self)
        if not 0.0 <= self.router_jitter_noise < 1.0:
            raise ValueError(
                f"Switch: router_jitter_noise={self.router_jitter_noise} is outside [0, 1)"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Gates share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> RoutedGate:
        """The checkpoint's own score, chosen and weighted as Switch does."""
        own = own_router(site)
        router = self._compose(own.score, slots_of(self, site), own_scaling(site))
        router.select = scaled_as(own.select, router.select)
        return RoutedGate.at(site, router, self.losses())

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A fresh router for a layer of one's own."""
        return self._compose(LinearScore(in_features, num_experts), self.top_k or 1, 1.0)

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged."""
        z_losses = (ZLoss(weight=self.router_z_loss_coef),) if self.router_z_loss_coef else ()
        return (*balance_losses(self.router_aux_loss_coef), *z_losses)

    def _compose(self, score: Score, slots: int, scaling: float) -> ComposedRouter:
        if self.router_jitter_noise:
            score = JitteredScore(score, noise=self.router_jitter_noise)
        return ComposedRouter(score, TopK(slots, normalize=False, routed_scaling_factor=scaling))
