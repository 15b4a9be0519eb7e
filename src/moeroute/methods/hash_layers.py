"""Hash layers: a token's id says which experts it has; there is no router to train.

    ids = table[token id];  w = 1 / K

Source: Hash Layers For Large Sparse Models, Roller et al., 2021, arXiv 2106.04426, section 3.
Differences from the paper: K experts with a share of 1 / K each, where the paper's several hashes
choose parts of one expert's matrices; in a dense checkpoint the experts are added beside the frozen
block, where the paper trains a model with them in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.experts import SwiGLUExperts
from moeroute.methods.checks import check_top_k
from moeroute.methods.ffn_parts import beside, check_added_fields
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.hash import HashScore
from moeroute.routers.select import TopKSoftmax
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.beside import BesideFeedForward
    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class HashLayers:
    """Experts by a fixed random table of token ids.

    The model must be called with `input_ids`; a new model also wants `moeroute.connect_layers`, so
    that its layers see them. A table by frequency: `router.score.set_table(balanced_table(...))`.

    Args:
        num_experts: Experts per block.
        intermediate_size: Width of one expert.
        top_k: Slots per token. 1 <= top_k <= num_experts.
        table_size: Rows of the table; ids beyond it share its rows, so take the vocabulary's size
            or more.
        seed: Of the tables; in a checkpoint each layer adds its depth, so that layers differ.

    Shapes:
        token_ids: (T,) int64; hidden_states: (..., H), any floating dtype.
        router_logits: (T, E) float32, 0 at the chosen and -inf elsewhere.
        routing_weights, selected_experts: (T, K); weights are 1 / K.

    Raises:
        ValueError: A field is out of range, or a block changes the width; in forward, no token ids.

    Cost: a row of the table. Adds E * 3 * H * I parameters and table_size * K numbers a block.
    Trains: experts. Inference: supported. Merging: undefined, experts depend on the token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, HashLayers(num_experts=8, intermediate_size=64))
    """

    paper: ClassVar[Paper] = Paper(
        title="Hash Layers For Large Sparse Models", arxiv="2106.04426", year=2021
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    num_experts: int = 8
    intermediate_size: int = 64
    top_k: int = 1
    table_size: int = 65536
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        check_added_fields(self)
        check_top_k(self, self.top_k)
        if self.table_size < 1:
            raise ValueError(f"HashLayers: table_size={self.table_size} is below 1")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Blocks share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> BesideFeedForward:
        """New experts beside the block, adding zero at first."""
        experts = SwiGLUExperts(self.num_experts, site.in_features, self.intermediate_size)
        seed = self.seed + max(site.layer_index, 0)
        router = self._compose(self.num_experts, seed)
        return beside(site, router, experts, self.losses())

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A router for a layer of one's own, of any width; give each layer another seed."""
        return self._compose(num_experts, self.seed)

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged: nothing, there is nobody to push."""
        return ()

    def _compose(self, num_experts: int, seed: int) -> ComposedRouter:
        score = HashScore(num_experts, self.top_k, table_size=self.table_size, seed=seed)
        return ComposedRouter(score, TopKSoftmax(self.top_k))
