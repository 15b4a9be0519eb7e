"""Expert choice: every expert takes the tokens that it is likeliest for.

    p = softmax_e(W x);  expert e takes the C tokens of highest p[:, e], C = capacity_factor * T / E
    w = p of the taken; in eval expert e takes the tokens above its mean cut-off in training

Source: Mixture-of-Experts with Expert Choice Routing, Zhou et al., 2022, arXiv 2202.09368, section
3.2. Differences from the paper: the cut-offs in eval are our own reading, so that a model which
writes one token after the other does not look at tokens that are not there; training still looks at
later tokens of the batch. In a dense checkpoint the experts are added beside the frozen block,
where the paper trains a model with them in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.experts import SwiGLUExperts
from moeroute.methods.ffn_parts import beside, check_added_fields
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.expert_choice import ExpertChoice as Select
from moeroute.routers.scores import LinearScore
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.beside import BesideFeedForward
    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """Experts that choose tokens, all of them the same number.

    In a causal language model training lets a token's experts depend on later tokens; the model is
    then scored on what it could not know. Read training losses with that in mind, and compare in
    eval, where each token is routed alone. Call `moeroute.post_step(model)` after every optimizer
    step, or give `Trainer` a `moeroute.PostStepCallback`; else eval compares with 1 / E.

    Args:
        num_experts: Experts per block.
        intermediate_size: Width of one expert.
        capacity_factor: Experts a token has on average. Default of the paper: 2.
        causal: In eval compare with the cut-offs; False chooses among the batch in eval too, which
            is right for encoders.

    Shapes:
        hidden_states: (..., H), any floating dtype; routed in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E), expert e in slot e, else an empty slot.

    Raises:
        ValueError: A field is out of range, or a block changes the width.

    Cost: one product with (E, H) and a sort of T an expert. Adds E * (H + 3 * H * I) parameters and
        E numbers a block.
    Trains: router and experts; cut-offs move by themselves. Inference: supported. Merging:
        undefined, the weights depend on the token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, ExpertChoice(num_experts=8))
        >>> wrapped(**batch).loss.backward(); optimizer.step(); moeroute.post_step(wrapped)
    """

    paper: ClassVar[Paper] = Paper(
        title="Mixture-of-Experts with Expert Choice Routing", arxiv="2202.09368", year=2022
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    num_experts: int = 8
    intermediate_size: int = 64
    capacity_factor: float = 2.0
    causal: bool = True

    def __post_init__(self) -> None:
        """Check every field."""
        check_added_fields(self)
        Select(self.num_experts, capacity_factor=self.capacity_factor)

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Blocks share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> BesideFeedForward:
        """New experts beside the block, adding zero at first."""
        experts = SwiGLUExperts(self.num_experts, site.in_features, self.intermediate_size)
        router = self.router(site.in_features, self.num_experts)
        return beside(site, router, experts, self.losses())

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A fresh router for a layer of one's own."""
        select = Select(num_experts, capacity_factor=self.capacity_factor, causal=self.causal)
        return ComposedRouter(LinearScore(in_features, num_experts), select)

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged: nothing, the load is flat."""
        return ()
