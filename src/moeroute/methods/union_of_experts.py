"""Union of Experts: one dense block, cut into slices of its hidden units that tokens choose.

    block(x) = sum_i W2_i act(W1_i x);  p = softmax(W x + b);  w = K * p over the K chosen, else 0
    training: slice i keeps its C highest weights of each sample;  y = sum_i w_i W2_i act(W1_i x)

Source: Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer, Yang
et al., 2025, arXiv 2503.02495; read from the abstract and the official code. Differences from the
code: weights are normalised over experts and multiply the output, so that the router has a
gradient, and sum to K, so that slices at even weights give the block's own output (our own
reading); the limit of a slice holds in training alone. Attention is left alone:
`moeroute.layers.union_attention` decomposes one by heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.experts import SwiGLUExperts
from moeroute.layers.moe import MoELayer
from moeroute.layers.union import UnionFeedForward, check_slices
from moeroute.methods.checks import check_top_k
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.granularity import PerSequence
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK
from moeroute.routers.sequence_capacity import SequenceCapacity
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class UnionOfExperts:
    """Routing over slices of the frozen block itself: nothing but a router is added.

    With top_k below num_experts a wrapped model does not equal the checkpoint: a token is given
    some of the block's hidden units and not the others. With top_k = num_experts it does, bit for
    bit, until the router is trained. Nothing is saved in a checkpoint, where the whole block is
    computed and then weighed; a `layer` computes the chosen slices alone.

    Args:
        num_experts: Slices; divides the block's intermediate size.
        top_k: Slices a token. 1 <= top_k <= num_experts.
        capacity: Share of a sample's tokens that a slice may take in training. Default of the
            paper: 0.5; 1 is no limit.
        by_sequence: All tokens of a sample have the same slices, by their mean (the paper's "expert
            selection"). Not causal in training; while text is generated the prompt decides.

    Shapes:
        hidden_states: (..., H), any floating dtype; routed in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K); weights sum to K per token, but for slots that a
            limit empties.

    Raises:
        ValueError: A field is out of range, or num_experts does not divide a block's hidden units.

    Cost: one product with (E, H). Adds E * (H + 1) parameters a block.
    Trains: router. Inference: supported, without limits. Merging: undefined, the weights depend on
        the token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, UnionOfExperts(num_experts=4, top_k=2))
        >>> layer = UnionOfExperts().layer(64, 256, 4)  # four experts of 64 hidden units
    """

    paper: ClassVar[Paper] = Paper(
        title="Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed "
        "Transformer",
        arxiv="2503.02495",
        year=2025,
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    num_experts: int = 4
    top_k: int = 2
    capacity: float = 0.5
    by_sequence: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        if self.num_experts < 1:
            raise ValueError(f"UnionOfExperts: num_experts={self.num_experts} is below 1")
        check_top_k(self, self.top_k)
        if not 0.0 < self.capacity <= 1.0:
            raise ValueError(
                f"UnionOfExperts: capacity={self.capacity} is outside (0, 1]; 0 takes no token"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Blocks share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> UnionFeedForward:
        """A router over slices of the block."""
        check_slices(site.widths["up"][1], self.num_experts, site.name)
        return UnionFeedForward(
            router=self.router(site.in_features, self.num_experts),
            parts=site.parts,
            losses=self.losses(),
            site=site.name,
            layer_index=site.layer_index,
        )

    def layer(self, hidden_size: int, intermediate_size: int, num_experts: int) -> MoELayer:
        """A layer of one's own: a block of this intermediate size, in so many slices."""
        width = check_slices(intermediate_size, num_experts, "the layer")
        return MoELayer(
            router=self.router(hidden_size, num_experts),
            experts=SwiGLUExperts(num_experts, hidden_size, width),
            losses=self.losses(),
        )

    def router(self, in_features: int, num_experts: int) -> nn.Module:
        """A fresh router; even weights at first where every slice is chosen."""
        std = 0.02 if self.top_k < num_experts else 0.0
        score = LinearScore(in_features, num_experts, bias=True, init_std=std)
        select = TopK(self.top_k, routed_scaling_factor=self.top_k)
        router: nn.Module = ComposedRouter(score, select)
        if self.by_sequence:
            return PerSequence(router)
        return SequenceCapacity(router, share=self.capacity) if self.capacity < 1.0 else router

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged: nothing, limits balance it."""
        return ()
