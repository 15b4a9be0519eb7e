"""Mixture-of-Depths: of each sequence a share of the tokens runs a layer, the others pass it.

    S  = the C n highest of r_t = w . h_t;  h_t <- h_t + g(r_t) f(h_S)_t for t in S
    in evaluation t is in S where a predictor on h_t says so

Source: Mixture-of-Depths: Dynamically Allocating Compute in Transformer-Based Language Models,
Raposo et al., 2024, arXiv 2404.02258; from general knowledge of the method, the paper was not read.
Our own reading: g(r) = 2 sigmoid(r), 1 at first, so that with a capacity of 1 a fresh method is the
base; the predictor decides on the prompt too, so that cached and whole texts agree. Differences
from the paper: the model is frozen and only routers train, where the paper trains from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.token_depth import TokenDepthLayer
from moeroute.losses.membership import MembershipLoss
from moeroute.routers.token_capacity import EveryToken, TokenCapacityRouter
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepths:
    """Routers that choose, in every second decoder layer, which tokens run it.

    Skipped tokens still leave their keys and values, so that others see them. In training the
    choice looks at the whole sequence; in evaluation a predictor decides token by token, and a
    fresh one lets all tokens run.

    Args:
        capacity: C, the share of tokens that run in training. Default of the paper: 0.125.
        every: A layer in so many is routed, the last of each; the others run as they are. Default
            of the paper: 2.
        predictor_loss_coef: Weight of the predictor's loss.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; the router computes in float32.
        num_executions: (B, S) int64 in {0, 1}.

    Raises:
        ValueError: A field is out of range; the model is no decoder, or a layer keeps a state that
            cannot be skipped.

    Cost: two products with (1, H) a routed layer; the layer on the tokens that run, and the keys
        and values of the others. Adds 2 H + 1 parameters a routed layer.
    Trains: routers and predictors. Inference: supported, with every cache of full or sliding keys.
        Merging: undefined.

    Example:
        >>> wrapped = moeroute.wrap_model(model, MixtureOfDepths(capacity=0.5))
    """

    paper: ClassVar[Paper] = Paper(
        title="Mixture-of-Depths: Dynamically Allocating Compute in Transformer-Based Language "
        "Models",
        arxiv="2404.02258",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "decoder_layer"

    capacity: float = 0.125
    every: int = 2
    predictor_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0.0 < self.capacity <= 1.0:
            raise ValueError(f"MixtureOfDepths: capacity={self.capacity} is outside (0, 1]")
        if self.every < 1 or self.predictor_loss_coef < 0:
            raise ValueError(
                f"MixtureOfDepths: every={self.every} must be at least 1, "
                f"predictor_loss_coef={self.predictor_loss_coef} 0 or more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Layers share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> TokenDepthLayer:
        """A router for every so-many-th layer; all tokens run the others."""
        place = {"site": site.name, "layer_index": site.layer_index}
        if site.layer_index % self.every != self.every - 1:
            return TokenDepthLayer(router=EveryToken(), **place)
        losses = (MembershipLoss(weight=self.predictor_loss_coef),)
        return TokenDepthLayer(
            router=TokenCapacityRouter(site.in_features, capacity=self.capacity),
            losses=losses if self.predictor_loss_coef else (),
            **place,
        )
