"""BlockFFN: experts of positive logit, weighted by their share of the root mean square.

    a = relu(W x);  w = g * a / sqrt(mean_e a^2 + eps);  y = sum_e w_e down_e(silu(up_e x))

Source: BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level
Activation Sparsity, Song et al., 2025, arXiv 2507.08771, section 3.1; read with the official code.
L = c_al * locality + c_cs * chunk sparsity, no balance. Differences from the paper: each layer
steers c_cs by its own loss, where the paper takes the mean over layers; in a dense checkpoint the
experts are added beside the frozen block, where the paper trains a model from scratch with them in
its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.experts import MLPExperts
from moeroute.losses.chunk_sparsity import ChunkSparsityLoss
from moeroute.losses.locality import LocalityLoss
from moeroute.methods.ffn_parts import beside, check_added_fields
from moeroute.routers.chunk_control import ChunkControl
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.positive import PositiveRMS
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import Select
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.beside import BesideFeedForward
    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class BlockFFN:
    """Many small ungated experts, as many a token as have a positive logit.

    Args:
        num_experts: Experts per block. Default of the paper's smallest model: 48.
        intermediate_size: Width of one expert. Default of the paper's smallest model: 64.
        eps: Added to the mean square.
        locality_loss_coef: Weight of `LocalityLoss`; 0 turns it off. Default of the paper: 2e-3.
        chunk_loss_coef: Weight of `ChunkSparsityLoss` at first, moved by `ChunkControl`; 0 turns it
            off. Default of the paper: 5e-2.
        chunk_size: Consecutive tokens that should share experts. Default of the paper: 64.

    Shapes:
        hidden_states: (..., H), any floating dtype; routed in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E), expert e in slot e, else an empty slot; with g of
            1 a token's squared weights sum to E.

    Raises:
        ValueError: A field is out of range, or a block changes the width.

    Cost: one product with (E, H), and an expert for each positive logit: about half of all at
        first. Adds E * (H + 2 * H * I + 1) parameters a block.
    Trains: router and experts; the weight of chunk sparsity moves by `moeroute.post_step`.
        Inference: supported, exactly the training's routing. Merging: undefined, the weights depend
        on the token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, BlockFFN(num_experts=16, intermediate_size=32))
        >>> layer = MoELayer(router=BlockFFN().router(64, 48), losses=BlockFFN().losses(),
        ...                  experts=MLPExperts(48, 64, 64, activation="silu"))
    """

    paper: ClassVar[Paper] = Paper(
        title="BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with "
        "Chunk-Level Activation Sparsity",
        arxiv="2507.08771",
        year=2025,
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    num_experts: int = 48
    intermediate_size: int = 64
    eps: float = 1e-6
    locality_loss_coef: float = 2e-3
    chunk_loss_coef: float = 5e-2
    chunk_size: int = 64

    def __post_init__(self) -> None:
        """Check every field."""
        check_added_fields(self)
        if self.eps <= 0:
            raise ValueError(f"BlockFFN: eps={self.eps} is not above 0; dead tokens would be NaN")
        if min(self.locality_loss_coef, self.chunk_loss_coef) < 0 or self.chunk_size < 1:
            raise ValueError(
                f"BlockFFN: locality_loss_coef={self.locality_loss_coef} and "
                f"chunk_loss_coef={self.chunk_loss_coef} must be 0 or more, "
                f"chunk_size={self.chunk_size} 1 or more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Blocks share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> BesideFeedForward:
        """New experts beside the block, adding zero at first."""
        experts = MLPExperts(
            self.num_experts, site.in_features, self.intermediate_size, activation="silu"
        )
        router = self.router(site.in_features, self.num_experts)
        return beside(site, router, experts, self.losses())

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A fresh router for a layer of one's own."""
        score = LinearScore(in_features, num_experts, init_std=None)
        select: Select = PositiveRMS(num_experts, eps=self.eps)
        if self.chunk_loss_coef:
            select = ChunkControl(
                select, coefficient=self.chunk_loss_coef, chunk_size=self.chunk_size
            )
        return ComposedRouter(score, select)

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged."""
        losses: list[AuxLoss] = []
        if self.locality_loss_coef:
            losses.append(LocalityLoss(weight=self.locality_loss_coef))
        if self.chunk_loss_coef:  # the coefficient is the router's
            losses.append(ChunkSparsityLoss(weight=1.0, chunk_size=self.chunk_size))
        return tuple(losses)
