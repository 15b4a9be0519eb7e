"""Group-limited routing: a token's experts lie in a few groups, such as those of one device.

    p = probs(W x);  a group's score is its highest p, or the sum of its two highest
    ids = the k highest p inside the best groups;  w = p[ids]  [renormalised]

Source: DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model, 2024,
arXiv 2405.04434, section 2.2.2, whose groups count by their highest expert; the sum of two is
DeepSeek-V3's, arXiv 2412.19437. Differences from the paper: at a checkpoint's gate its own
probabilities, weights and bias for choosing stay; the balance loss is Switch's alone, without those
over devices and communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.routed_gate import RoutedGate
from moeroute.methods.checks import check_balance_weight
from moeroute.methods.gate_parts import (
    balance_losses,
    check_slots,
    own_bias,
    own_probs,
    own_router,
    own_scaling,
    scaled_as,
    slots_of,
)
from moeroute.ops.probs import softmax_probs
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.group_top_k import GroupTopK
from moeroute.routers.scores import LinearScore
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class GroupLimited:
    """A limit on groups at the gate of an MoE block, or in a `MoELayer`.

    A fresh method starts from the checkpoint's rows: a token keeps those of its experts that lie in
    its best groups. With one group it keeps the checkpoint's routing.

    Args:
        num_groups: Equal groups of experts in order; divides num_experts of every site.
        top_k_groups: Groups a token may choose from. 1 <= top_k_groups <= num_groups.
        group_score_size: 1: a group counts by its highest expert (DeepSeek-V2); 2: by the sum of
            its two highest (DeepSeek-V3).
        top_k: Slots per token, at most the experts of top_k_groups; None for the checkpoint's.
        router_aux_loss_coef: Weight of the balance loss, 1.0 at perfect balance; 0 turns it off.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K), weighed as the host's gate does.

    Raises:
        ValueError: A field is out of range, num_groups does not divide the experts of a site, or
            its top_k exceeds the experts of top_k_groups.

    Cost: one product with (E, H). Adds E * H parameters a gate.
    Trains: router. Inference: supported.

    Example:
        >>> wrapped = moeroute.wrap_model(model, GroupLimited(num_groups=4, top_k_groups=2))
    """

    paper: ClassVar[Paper] = Paper(
        title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        arxiv="2405.04434",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "gate"

    num_groups: int = 2
    top_k_groups: int = 1
    group_score_size: int = 1
    top_k: int | None = None
    router_aux_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_slots(self)
        check_balance_weight(self)
        GroupTopK(
            self.top_k or 1,
            num_groups=self.num_groups,
            top_k_groups=self.top_k_groups,
            group_score_size=self.group_score_size,
        )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Gates share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> RoutedGate:
        """The checkpoint's own score and probabilities, chosen within groups."""
        own = own_router(site)
        probs, normalize = own_probs(own.select)
        select = GroupTopK(
            slots_of(self, site),
            num_groups=self.num_groups,
            top_k_groups=self.top_k_groups,
            group_score_size=self.group_score_size,
            selection_bias=own_bias(own.select),
            probs=probs,
            normalize=normalize,
            routed_scaling_factor=own_scaling(site),
        )
        losses = balance_losses(self.router_aux_loss_coef, probs)
        router = ComposedRouter(own.score, scaled_as(own.select, select))
        return RoutedGate.at(site, router, losses)

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A fresh router for a layer of one's own; top_k is 2 where the method has None."""
        select = GroupTopK(
            self.top_k or 2,
            num_groups=self.num_groups,
            top_k_groups=self.top_k_groups,
            group_score_size=self.group_score_size,
            probs=softmax_probs,
            normalize=False,
        )
        return ComposedRouter(LinearScore(in_features, num_experts), select)

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged."""
        return balance_losses(self.router_aux_loss_coef)
