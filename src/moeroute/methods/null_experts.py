"""Null, copy and constant experts (MoE++): a token may choose to compute less.

    logits_i = W_i x + V_i logits_{i-1};  top-k of the softmax
    FFN experts, then null: 0, copy: x, constant: a x + b v with (a, b) = softmax(U x)
    L = E sum_e eta_e f_e P_e, eta = 1 for FFN experts and cheapness for the others

Source: MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts, Jin et al.,
2024, arXiv 2410.07348; read from the abstract, equations are our own reading. Differences from the
paper: no capacities, so that no token is dropped; weights are the probabilities, not renormalised.
In a dense checkpoint all of it is added beside the frozen block, times a gain that starts at 0,
where the paper trains a model with it in the block's place: there the block still computes for
every token, so that nothing is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.beside import BesideFeedForward
from moeroute.layers.cheap_experts import CheapExperts
from moeroute.layers.experts import SwiGLUExperts
from moeroute.layers.moe import MoELayer
from moeroute.losses.kinds_balance import KindsBalanceLoss
from moeroute.methods.checks import check_balance_weight, check_top_k
from moeroute.methods.ffn_parts import FirstSite, check_added_fields, check_width
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.pathway import PathwayRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class NullExperts:
    """Feed-forward experts beside experts that discard, skip or replace a token.

    Args:
        num_experts: Feed-forward experts.
        intermediate_size: Width of one of them.
        top_k: Slots per token, over experts of all kinds.
        num_null: Experts that give nothing.
        num_copy: Experts that give the token back.
        num_constant: Experts that mix the token with a vector.
        gating_residual: Add a map of the logits of the layer before. The layers must then be run
            inside a wrapped model, or one of your own after `moeroute.connect_layers`.
        cheapness: Price of the cheap experts in the balance loss. Default of the paper: 0.75.
        router_aux_loss_coef: Weight of that loss; 0 turns it off.

    Shapes:
        hidden_states: (..., H), any floating dtype; routed in float32.
        router_logits: (T, E) float32 over experts of all kinds.
        routing_weights, selected_experts: (T, K); weights sum to at most 1.

    Raises:
        ValueError: A field is out of range, or a block changes the width.

    Cost: one product with (E, H), and feed-forward experts for the slots that chose one.
    Trains: router and experts. Inference: supported. Merging: undefined, the weights depend on the
        token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, NullExperts(num_experts=8))
        >>> layer = NullExperts(gating_residual=False).layer(64, 128, 8)
    """

    paper: ClassVar[Paper] = Paper(
        title="MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts",
        arxiv="2410.07348",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    num_experts: int = 8
    intermediate_size: int = 64
    top_k: int = 2
    num_null: int = 1
    num_copy: int = 1
    num_constant: int = 2
    gating_residual: bool = True
    cheapness: float = 0.75
    router_aux_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_added_fields(self)
        check_top_k(self, self.top_k)
        check_balance_weight(self)
        if min(self.num_null, self.num_copy, self.num_constant, self.cheapness) < 0:
            raise ValueError("NullExperts: num_null, num_copy, num_constant, cheapness: 0 or more")

    def build_shared(self, sites: Sequence[Site], /) -> FirstSite:
        """Which block comes first: it has no logits before it."""
        return FirstSite(sites[0].name)

    def build(self, site: Site, shared: nn.Module | None, /) -> BesideFeedForward:
        """Experts of all kinds beside the block, times a gain of zero at first."""
        first = isinstance(shared, FirstSite) and shared.name == site.name
        width = check_width(site)
        layer = self._layer(width, self.intermediate_size, self.num_experts, first)
        layer.site, layer.layer_index = site.name, site.layer_index
        return BesideFeedForward(layer, has_gain=True)

    def layer(self, hidden_size: int, intermediate_size: int, num_experts: int) -> MoELayer:
        """A layer for a model of one's own; the first of the model ignores its residual."""
        return self._layer(hidden_size, intermediate_size, num_experts, first=False)

    def losses(self, num_experts: int) -> tuple[AuxLoss, ...]:
        """What a layer of so many feed-forward experts is charged."""
        loss = KindsBalanceLoss(
            num_first=num_experts, cheapness=self.cheapness, weight=self.router_aux_loss_coef
        )
        return (loss,) if self.router_aux_loss_coef else ()

    def _layer(self, hidden_size: int, width: int, num_experts: int, first: bool) -> MoELayer:  # noqa: FBT001
        experts = CheapExperts(
            SwiGLUExperts(num_experts, hidden_size, width),
            num_null=self.num_null,
            num_copy=self.num_copy,
            num_constant=self.num_constant,
        )
        score = LinearScore(hidden_size, experts.num_experts)
        select = TopK(self.top_k, normalize=False)
        router: nn.Module = ComposedRouter(score, select)
        if self.gating_residual:
            router = PathwayRouter(score, select, is_first=first)
        return MoELayer(router=router, experts=experts, losses=self.losses(num_experts))
