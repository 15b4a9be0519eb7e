"""Soft MoE: experts work on mixtures of tokens, and tokens get mixtures of their outputs.

    l = scale * norm(x) . norm(phi);  D = softmax over tokens,  C = softmax over slots
    slots = D^T x;  y = C (expert_e(slots of e))

Source: From Sparse to Soft Mixtures of Experts, Puigcerver et al., 2023, arXiv 2308.00951, section
2; the scale and the normalisation as in the official code. Differences from the paper: experts are
gated; in a checkpoint the experts are added beside the frozen block, where the paper trains a model
with them in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.beside import BesideFeedForward, start_at_zero
from moeroute.layers.experts import SwiGLUExperts
from moeroute.layers.soft_moe import SlotRouter, SoftMoELayer
from moeroute.methods.ffn_parts import check_added_fields, check_width
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class SoftMoE:
    """Slots that are mixtures of all tokens of a sample: for encoders.

    In a causal language model a token's output depends on later tokens, and changes while text is
    generated; such a model is warned about where it keeps a key-value cache.

    Args:
        num_experts: Experts per block.
        intermediate_size: Width of one expert.
        slots_per_expert: Slots of each. The paper advises as many slots as tokens, or fewer.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; weights in float32.
        dispatch, combine: (B, S, E, P) float32.

    Raises:
        ValueError: A field is out of range, or a block changes the width.

    Cost: B * S * E * P * H for each of three products, and the experts on B * E * P rows, whatever
        S is. Adds E * (P * H + 3 * H * I) + 1 parameters a block.
    Trains: router and experts. Inference: supported, of whole samples. Merging: undefined, the
        weights depend on the token.

    Example:
        >>> wrapped = moeroute.wrap_model(encoder, SoftMoE(num_experts=8, slots_per_expert=4))
        >>> layer = SoftMoE(slots_per_expert=4).layer(64, 128, 8)
    """

    paper: ClassVar[Paper] = Paper(
        title="From Sparse to Soft Mixtures of Experts", arxiv="2308.00951", year=2023
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    num_experts: int = 8
    intermediate_size: int = 64
    slots_per_expert: int = 1

    def __post_init__(self) -> None:
        """Check every field."""
        check_added_fields(self)
        if self.slots_per_expert < 1:
            raise ValueError(
                f"SoftMoE: slots_per_expert={self.slots_per_expert} is below 1; use 1 or more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Blocks share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> BesideFeedForward:
        """New experts beside the block, adding zero at first."""
        layer = self.layer(check_width(site), self.intermediate_size, self.num_experts)
        layer.site, layer.layer_index = site.name, site.layer_index
        start_at_zero(layer.experts)
        return BesideFeedForward(layer)

    def layer(self, hidden_size: int, intermediate_size: int, num_experts: int) -> SoftMoELayer:
        """A layer for a model of one's own, in the place of a feed-forward block."""
        return SoftMoELayer(
            router=SlotRouter(hidden_size, num_experts, self.slots_per_expert),
            experts=SwiGLUExperts(num_experts, hidden_size, intermediate_size),
        )
