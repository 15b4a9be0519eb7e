"""Relative-norm halting: a token that a layer hardly moves skips all later ones; nothing trains.

    token t stops after layer l where |h_l - h_{l-1}| < threshold * |h_{l-1}|

Source: Equifinality in Mixture of Experts, Ternovtsii and Bilak, 2026, arXiv 2604.14419, which
halts between the hops of one layer; the formula is our own reading, from the abstract. Difference
from the paper: decoder layers for hops. `moeroute.layers.MultiHopLayer` halts between hops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.token_depth import TokenDepthLayer
from moeroute.routers.norm_halting import NormHaltingRouter
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class NormHalting:
    """Layers that tokens stop running once they have come to rest, without any training.

    A token that stopped keeps giving its keys and values to later layers. Choose the threshold on
    held-out text: the layers that run fall as it grows.

    Args:
        threshold: Relative move below which a token stops; 0 never stops.
        first_layer: Layers before this one always run.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; norms in float32.
        num_executions: (B, S) int64 in {0, 1}.

    Raises:
        ValueError: A field is out of range; the model is no decoder, or a layer keeps a state that
            cannot be skipped.

    Cost: two norms a token and layer, and the hidden states of one layer. Adds no parameters.
    Trains: nothing. Inference: supported, with every cache of full or sliding keys. Merging:
        undefined.

    Example:
        >>> wrapped = moeroute.wrap_model(model, NormHalting(threshold=0.1))
    """

    paper: ClassVar[Paper] = Paper(
        title="Equifinality in Mixture of Experts", arxiv="2604.14419", year=2026
    )
    site_kind: ClassVar[SiteKind] = "decoder_layer"

    threshold: float = 0.05
    first_layer: int = 1

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.threshold >= 0.0 or self.first_layer < 0:
            raise ValueError(
                f"NormHalting: threshold={self.threshold} and first_layer={self.first_layer} must "
                "be 0 or more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Layers share nothing but the states that they hand on."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> TokenDepthLayer:
        """A router that compares the layer's input with the one before."""
        router = NormHaltingRouter(
            threshold=self.threshold,
            first_layer=self.first_layer,
            layer_index=site.layer_index,
        )
        return TokenDepthLayer(router=router, site=site.name, layer_index=site.layer_index)
