"""Early exit: a model that can be left after any of its layers, through its one output embedding.

    p_l     = p_max (2^{l / (L - 1)} - 1), the rate at which a sequence skips layer l in training
    J       = sum_l w_l CE(head(norm(h_{l+1}))),  w_l ~ s (0 + ... + l),  the last more, sum 1
    logits  = head(norm(T_e(h_e))) after e layers,  T_e(h) = h + U_e D_e h

Source: LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, Elhoushi et al.,
2024, arXiv 2404.16710, section 4; from general knowledge of the paper and a review, its code was
not opened. The paper trains the whole model and adds nothing. Our own reading: T_e, so that exits
of a frozen model can learn (a low-rank lens as in arXiv 2303.08112); tokens that stop by their
confidence, as in CALM (arXiv 2207.07061); both curricula may be used together, and some exit is
taught at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.early_exit import EarlyExitLayer, ExitTransform, check_exit
from moeroute.layers.exit_schedule import ExitClock, ExitSchedule
from moeroute.routers.confidence import ConfidenceRouter
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """Layers that are taught, and then left out from the end.

    Training needs `labels`. Frozen, the transforms of the exits learn. For the paper's recipe also
    train the model: `wrapped.get_base_model().requires_grad_(True)` with `layer_dropout` 0.1 or
    0.2 and `exit_rank` 0; then `moeroute.unwrap_model(wrapped)` is an ordinary checkpoint, which
    `generate(assistant_early_exit=e)` of transformers knows. Inside `moeroute.depth.exit_at` a
    wrapped model is left elsewhere.

    Args:
        exit_layer: Layers that run in evaluation; None or all of them: the base.
        threshold: Probability of the next token at which a token stops in evaluation; None: no
            token stops by itself.
        first_exit: Layers that every token runs.
        layer_dropout: p_max. 0, as layers are frozen; the paper's is 0.1 or 0.2.
        dropout_steps: Steps over which the rates rise, for training from scratch; 0: constant.
        loss_scale: s; 0 teaches no exit.
        every: R, an exit in so many is taught at a step, in turn.
        gradual_steps: Steps T of which every T / 2L one more exit is taught, the last first.
        exit_rank: Of U and D; 0: states leave as they are, and nothing is added.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; probabilities and losses in float32.
        num_executions: (B,) or, with a threshold, (B, S) int64 in {0, 1}.

    Raises:
        ValueError: A field is out of range; the model is no causal decoder, a layer keeps a state
            that cannot be skipped, or some of its last layers are not among the targets.

    Cost: in training the output embedding for L / R exits; with a threshold, for each token and
        layer. Adds 2 R H parameters an exit but the first, R here the rank.
    Trains: transforms of the exits; the model where it is not frozen. Inference: supported, with
        every cache of full or sliding keys. Merging: undefined.

    Example:
        >>> wrapped = moeroute.wrap_model(model, EarlyExit(exit_layer=8))
    """

    paper: ClassVar[Paper] = Paper(
        title="LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding",
        arxiv="2404.16710",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "decoder_layer"

    exit_layer: int | None = None
    threshold: float | None = None
    first_exit: int = 1
    layer_dropout: float = 0.0
    dropout_steps: int = 0
    loss_scale: float = 0.2
    every: int = 8
    gradual_steps: int = 0
    exit_rank: int = 8

    def __post_init__(self) -> None:
        """Check every field."""
        least = {"first_exit": 1, "every": 1, "dropout_steps": 0, "gradual_steps": 0}
        for name, low in (least | {"exit_rank": 0, "exit_layer": 1, "threshold": 0}).items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"EarlyExit: {name}={value} is below {low}")
        for name in ("layer_dropout", "loss_scale"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"EarlyExit: {name}={getattr(self, name)} is outside [0, 1]")

    def build_shared(self, sites: Sequence[Site], /) -> ExitClock:
        """The count of training steps; whoever leaves must be let out by all later layers."""
        layers, total = [site.layer_index for site in sites], sites[0].num_layers
        check_exit(self.exit_layer, total, first=layers[0])
        if layers != list(range(layers[0], total)):
            raise ValueError(
                f"EarlyExit: the targets are layers {layers} of {total}; who leaves before one "
                "skips all later ones, so take every layer from the first target to the last"
            )
        return ExitClock(sites[0].name)

    def build(self, site: Site, shared: nn.Module | None, /) -> EarlyExitLayer:
        """A place to leave before the layer."""
        schedule = ExitSchedule(
            num_layers=site.num_layers,
            layer_dropout=self.layer_dropout,
            dropout_steps=self.dropout_steps,
            loss_scale=self.loss_scale,
            every=self.every,
            gradual_steps=self.gradual_steps,
        )
        adds = self.exit_rank > 0 and site.layer_index in schedule.taught()
        return EarlyExitLayer(
            router=ConfidenceRouter(
                threshold=self.threshold, first_exit=self.first_exit, layer_index=site.layer_index
            ),
            schedule=schedule,
            clock=shared if isinstance(shared, ExitClock) else ExitClock(site.name),
            transform=ExitTransform(site.in_features, self.exit_rank) if adds else None,
            exit_layer=self.exit_layer,
            site=site.name,
            layer_index=site.layer_index,
        )
