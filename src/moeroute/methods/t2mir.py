"""T2MIR: two mixtures side by side, one that routes tokens and one that routes tasks.

    y = concat(MoE_token(x), MoE_task(x)), half of the features each
    token: top-k of W2 tanh(W1 x) + noise, softmax over the k;  L = CV^2(importance)
    task:  top-k of W2 tanh(W1 x), softmax over the k;  L = InfoNCE between samples of one task

Source: Mixture-of-Experts Meets In-Context Reinforcement Learning, Wu et al., 2025, arXiv
2506.05426; read from the abstract and the official code. Differences from the code: the
token branch is charged for importance alone, not for load too, and losses are averaged over layers;
by default every token is routed by itself (the code's soft mode), because the mean of a sequence
tells a token what comes after it. In a dense checkpoint both branches are added beside the frozen
block, where the paper puts them in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.beside import BesideFeedForward, start_at_zero
from moeroute.layers.branch_experts import BranchExperts
from moeroute.layers.branches import Branches
from moeroute.layers.moe import MoELayer
from moeroute.losses.importance import ImportanceLoss
from moeroute.losses.same_pair import SamePairLoss
from moeroute.methods.checks import check_top_k
from moeroute.methods.ffn_parts import check_added_fields, check_width
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.granularity import PerSequence
from moeroute.routers.mlp_score import MLPScore
from moeroute.routers.momentum import MomentumRouter
from moeroute.routers.noisy import NoisyScore
from moeroute.routers.select import TopKSoftmax
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class T2MIR:
    """A token-wise and a task-wise mixture, each giving half of the features.

    Train on batches of pairs: sample i and sample i + B/2 are of the same task. Call
    `moeroute.post_step(model)` after every optimizer step, so that the momentum gate follows.

    Args:
        num_experts: Experts of each branch. Default of the paper: 6 and 8.
        intermediate_size: Width of one expert.
        top_k: Slots per token, in each branch. 1 <= top_k <= num_experts.
        by_sequence: Route the task branch once a sample, by the mean of its tokens (the code's hard
            mode). Not causal: in training a token's routing knows later tokens; while text is
            generated the prompt decides.
        momentum: Rate of the momentum gate.
        importance_loss_coef: Weight of the token branch's balance loss; 0 turns it off.
        contrast_loss_coef: Weight of the contrast between pairs; 0 turns it off.

    Shapes:
        hidden_states: (..., H), any floating dtype, H even; routed in float32.
        router_logits: (T, E) float32, one record a branch.
        routing_weights, selected_experts: (T, K); weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range, or a block changes the width or has an odd one; in
            training, an odd number of samples with contrast_loss_coef above 0.

    Cost: per branch a product with (E, H), one with (E, E), and top_k experts of half width out.
    Trains: router and experts; the momentum gate moves by itself. Inference: supported. Merging:
        undefined, the weights depend on the token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, T2MIR(num_experts=6))
        >>> layer = T2MIR().layer(64, 128, 6)
    """

    paper: ClassVar[Paper] = Paper(
        title="Mixture-of-Experts Meets In-Context Reinforcement Learning",
        arxiv="2506.05426",
        year=2025,
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    num_experts: int = 8
    intermediate_size: int = 64
    top_k: int = 2
    by_sequence: bool = False
    momentum: float = 0.005
    importance_loss_coef: float = 0.1
    contrast_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_added_fields(self)
        check_top_k(self, self.top_k)
        if not 0.0 < self.momentum <= 1.0:
            raise ValueError(f"T2MIR: momentum={self.momentum} is outside (0, 1]")
        if min(self.importance_loss_coef, self.contrast_loss_coef) < 0:
            raise ValueError("T2MIR: a loss with a coefficient below 0 would be sought; use 0")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Blocks share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> BesideFeedForward:
        """Both branches beside the block, adding zero at first."""
        made = self._branches(check_width(site), self.intermediate_size, self.num_experts)
        for branch, name in zip(made, ("token", "task"), strict=True):
            branch.site, branch.layer_index = f"{site.name}.{name}", site.layer_index
            start_at_zero(branch.experts)
        return BesideFeedForward(Branches(made))

    def layer(self, hidden_size: int, intermediate_size: int, num_experts: int) -> Branches:
        """A layer for a model of one's own, in the place of a feed-forward block."""
        return Branches(self._branches(hidden_size, intermediate_size, num_experts))

    def router(self, in_features: int, num_experts: int) -> nn.Module:
        """A fresh router of the task branch."""
        score, select = MLPScore(in_features, num_experts), TopKSoftmax(self.top_k)
        router: nn.Module = ComposedRouter(score, select)
        if self.contrast_loss_coef:
            hard = self.by_sequence
            router = MomentumRouter(score, select, rate=self.momentum, raw_features=hard)
        return PerSequence(router) if self.by_sequence else router

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged."""
        return (SamePairLoss(weight=self.contrast_loss_coef),) if self.contrast_loss_coef else ()

    def _branches(self, hidden_size: int, width: int, num_experts: int) -> list[MoELayer]:
        if hidden_size % 2:
            raise ValueError(f"T2MIR: hidden_size={hidden_size} is odd; each branch gives half")
        sizes = (num_experts, hidden_size, width, hidden_size // 2)
        score = NoisyScore(MLPScore(hidden_size, num_experts))
        weight = self.importance_loss_coef
        token = MoELayer(
            router=ComposedRouter(score, TopKSoftmax(self.top_k)),
            experts=BranchExperts(*sizes),
            losses=(ImportanceLoss(weight=weight),) if weight else (),
        )
        task = MoELayer(
            router=self.router(hidden_size, num_experts),
            experts=BranchExperts(*sizes),
            losses=self.losses(),
        )
        return [token, task]
