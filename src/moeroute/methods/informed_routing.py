"""Informed routing: a token's attention or feed-forward is executed, or foretold by a tiny network.

    u = norm(x);  x <- x + g F(u) + (1 - g) LFF(u),  LFF(u) = A2 silu(A1 u + a1) + a2
    g = 1 where W2 relu(W1 u + b1) + b2 says "execute", in training drawn by hard Gumbel-softmax
    stage 1: SmoothL1(LFF(u), F(u));  stage 2: CE + 8 |(1 - s) - mean g| + w R
    R = mean of 1 - cos(u, u + F(u)) over tokens with g = 0

Source: Informed Routing in LLMs: Smarter Token-Level Computation for Faster Inference, Han et al.,
2025, arXiv 2510.13831; read from the abstract, reviews and the official code. Differences from the
code: evaluation decides without noise and computes what it chose alone, where the code draws and
computes both; padding enters no loss; all units share one temperature; routers read u (the code can
have them read x). Our own reading: R has its gradient through g and is averaged over units; the
forecasters' N(0, 1e-3) is a standard deviation. Left out: LoRA on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.forecast_units import ForecastLayer, ForecastUnit
from moeroute.layers.forecaster import FeatureForecaster
from moeroute.losses.forecast import ForecastLoss
from moeroute.losses.unit_gates import ForetoldChangeLoss, SparsityTargetLoss
from moeroute.methods.checks import check_units
from moeroute.routers.step_schedule import SharedSchedule, StepSchedule
from moeroute.routers.unit_gate import UnitGateRouter
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind

LEAST_WIDTH, COLDEST = 16, 1e-6
TEMPERATURES = ("start_temperature", "end_temperature")


@dataclass(frozen=True, kw_only=True)
class InformedRouting:
    """Two routers and two forecasters a decoder layer, for its attention and its feed-forward.

    Train in two stages, each begun by `moeroute.depth.train_only`: first the forecasters, on text
    without labels, then the routers, which `moeroute.depth.first_guess` may start. Routers that
    nobody trained choose at random: a fresh method equals the base in stage 1 alone, and where
    routers say "execute" for every token.

    Args:
        sparsity: s, the share of pairs of token and unit that are foretold, over all layers.
        forecaster_width: Between a forecaster's two linears. Default of the code: 100.
        router_width: Between a router's two linears; None for max(16, H // 4 - 200), the code's
            where that is positive.
        start_temperature: Of the draws, at the first step. Default of the code: 5.
        end_temperature: From the last step on. Default of the code: 1.
        temperature_steps: Optimizer steps between them. Default of the code: 2000.
        forecast_loss_coef: Weight of the forecasters' loss.
        sparsity_loss_coef: Weight of the distance from s. Default of the code: 8.
        change_loss_coef: w, weight of R. Default of the code: 1.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; routers compute in float32.
        num_executions: (B, S) int64 in {0, 1} a unit.

    Raises:
        ValueError: A field is out of range; the model is no decoder, or a layer has no two units
            that can be told apart, or keeps a state that cannot be skipped.

    Cost: one product with (router_width, H) a token and unit, and the unit or two products with
        (100, H). The projections of attention are computed for every token, whose keys and values
        stay visible. Training computes both. Adds (router_width + 2 * 100 + 1) * H + 3 *
        router_width + 102 parameters a unit.
    Trains: what `train_only` says, all after wrapping. Inference: supported, with every cache of
        full or sliding keys. Merging: undefined.

    Example:
        >>> wrapped = moeroute.wrap_model(model, InformedRouting(sparsity=0.4)).train()
        >>> moeroute.depth.train_only(wrapped, "forecasters")
        >>> wrapped(input_ids=text).loss.backward()
        >>> moeroute.depth.train_only(wrapped, "routers")
        >>> wrapped(input_ids=text, labels=text).loss.backward()
    """

    paper: ClassVar[Paper] = Paper(
        title="Informed Routing in LLMs: Smarter Token-Level Computation for Faster Inference",
        arxiv="2510.13831",
        year=2025,
    )
    site_kind: ClassVar[SiteKind] = "decoder_layer"

    sparsity: float = 0.25
    forecaster_width: int = 100
    router_width: int | None = None
    start_temperature: float = 5.0
    end_temperature: float = 1.0
    temperature_steps: int = 2000
    forecast_loss_coef: float = 1.0
    sparsity_loss_coef: float = 8.0
    change_loss_coef: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        least = {"forecaster_width": 1, "router_width": 1, "forecast_loss_coef": 0}
        least |= {"sparsity_loss_coef": 0, "change_loss_coef": 0}
        for name, low in (least | dict.fromkeys(TEMPERATURES, COLDEST)).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"InformedRouting: {name}={value} is below {low}")
        try:
            self._schedule()
            self._routing_losses()
        except ValueError as error:
            raise ValueError(f"InformedRouting: {error}") from None

    def build_shared(self, sites: Sequence[Site], /) -> SharedSchedule:
        """One temperature for all units; the first layer's attention owns it."""
        return SharedSchedule(self._schedule(), sites[0].name)

    def build(self, site: Site, shared: nn.Module | None, /) -> ForecastLayer:
        """A router and a forecaster for each unit."""
        if not isinstance(shared, SharedSchedule):
            raise ValueError("InformedRouting needs what build_shared made; pass it on")
        check_units(self, site)
        units = {
            unit: ForecastUnit(
                router=UnitGateRouter(
                    site.in_features,
                    width=self.router_width or max(LEAST_WIDTH, site.in_features // 4 - 200),
                    schedule=shared.schedule,
                    owns_schedule=unit == "attention" and shared.owner == site.name,
                ),
                forecaster=FeatureForecaster(site.in_features, width=self.forecaster_width),
                forecast_losses=(ForecastLoss(weight=self.forecast_loss_coef),),
                routing_losses=self._routing_losses(),
                site=f"{site.name}.{child}",
                layer_index=site.layer_index,
            )
            for unit, child in site.parts.items()
        }
        return ForecastLayer(attention=units["attention"], feed_forward=units["feed_forward"])

    def _schedule(self) -> StepSchedule:
        return StepSchedule(
            start=self.start_temperature, end=self.end_temperature, steps=self.temperature_steps
        )

    def _routing_losses(self) -> tuple[AuxLoss, ...]:
        target = SparsityTargetLoss(sparsity=self.sparsity, weight=self.sparsity_loss_coef)
        return target, ForetoldChangeLoss(weight=self.change_loss_coef)
