"""A decoder layer whose attention and feed-forward are executed or foretold for each token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.depth_types import UnitTrace
from moeroute.layers.depth_record import depth_record
from moeroute.layers.post_step import in_backward, stateful_parts
from moeroute.routers.learns import learns
from moeroute.routing_pass import RoutingPass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moeroute.depth_types import DecoderCall, DepthOutput, RunUnit, UnitName
    from moeroute.layers.forecaster import FeatureForecaster
    from moeroute.routers.unit_gate import UnitGateRouter
    from moeroute.types import AuxLoss

LAYER_SHARE = 0.5


class ForecastLayer(nn.Module):
    """Answers for the two units of a decoder layer, which keeps its own norms and residuals.

        x <- x + g F(u) + (1 - g) LFF(u),  u = norm(x),  for attention, then for feed-forward

    Keys and values of every token are computed and kept, so that all stay visible to later ones.

    Args:
        attention: For the attention.
        feed_forward: For the feed-forward.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; the output has its shape.

    Raises:
        ValueError: In forward, a cache that was filled under `force_depth`.
    """

    def __init__(self, *, attention: ForecastUnit, feed_forward: ForecastUnit) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, hidden_states: Tensor, call: DecoderCall) -> Tensor:
        """Answer in place of the decoder layer: it runs, and asks `answer_unit` on its way."""
        return call.run_units(hidden_states)

    def answer_unit(self, unit: UnitName, tokens: Tensor, run: RunUnit) -> Tensor:
        """Execute or foretell (B, S, H) tokens."""
        return (self.attention if unit == "attention" else self.feed_forward)(tokens, run)


class ForecastUnit(nn.Module):
    """One unit of a decoder layer, executed for some tokens and foretold for the others.

    What happens depends on what learns (`requires_grad`):

        evaluation, or nothing learns   the router's choice; what is foretold is not computed
        forecasters learn alone         every token is executed, the forecaster watches
        routers learn                   both are computed and g, drawn, takes one of them

    Args:
        router: Says which tokens are executed.
        forecaster: (..., H) to (..., H).
        forecast_losses: Charged in training while the forecaster learns.
        routing_losses: Charged in training while the router learns.
        site: Full module name of the unit.
        layer_index: Place of its layer among the decoder layers.

    Shapes:
        tokens: (B, S, H), any floating dtype; the output has its shape and dtype.
    """

    def __init__(
        self,
        *,
        router: UnitGateRouter,
        forecaster: FeatureForecaster,
        forecast_losses: tuple[AuxLoss, ...] = (),
        routing_losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.forecaster = forecaster
        self.forecast_losses = forecast_losses
        self.routing_losses = routing_losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    @property
    def stages(self) -> Mapping[str, tuple[nn.Module, ...]]:
        """What learns by itself: see `moeroute.depth.train_only`."""
        return {"forecasters": (self.forecaster,), "routers": (self.router,)}

    @property
    def losses(self) -> tuple[AuxLoss, ...]:
        """What this unit asks to be charged now."""
        teaching = self.forecast_losses if learns(self.forecaster) else ()
        routing = self.routing_losses if learns(self.router) else ()
        return (*teaching, *routing) if self.training else ()

    def forward(self, tokens: Tensor, run: RunUnit) -> Tensor:
        """Answer in place of the unit."""
        if self.training and learns(self.router):
            return self._gated(tokens, run)
        if self.training and learns(self.forecaster):
            return self._executed(tokens, run)
        return self._chosen(tokens, run)

    def _chosen(self, tokens: Tensor, run: RunUnit) -> Tensor:
        depth = self.router(self.routing_pass.router_input(tokens, self.site))
        self._keep(tokens, depth.num_executions, depth)
        kept = depth.num_executions > 0  # (B, S)
        ran = run(kept)
        if bool(kept.all()):
            return ran
        forecast = self.forecaster(tokens[~kept])
        return ran.index_put((~kept,), forecast.to(ran.dtype))

    def _executed(self, tokens: Tensor, run: RunUnit) -> Tensor:
        ran = run(None)
        trace = UnitTrace(
            tokens=tokens.detach(),
            executed=ran.detach(),
            forecast=self.forecaster(tokens.detach()),
        )
        everyone = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
        self._keep(tokens, everyone, None, trace)
        return ran

    def _gated(self, tokens: Tensor, run: RunUnit) -> Tensor:
        depth = self.router(self.routing_pass.router_input(tokens, self.site))
        ran, forecast = run(None), self.forecaster(tokens)
        trace = UnitTrace(
            tokens=tokens.detach(),
            executed=ran.detach(),
            forecast=forecast if learns(self.forecaster) else None,
        )
        self._keep(tokens, depth.num_executions, depth, trace)
        gate = depth.routing_weights[..., None].to(ran.dtype)
        return gate * ran + (1 - gate) * forecast.to(ran.dtype)

    def _keep(
        self,
        tokens: Tensor,
        executions: Tensor,
        depth: DepthOutput | None,
        trace: UnitTrace | None = None,
    ) -> None:
        losses, routing_pass = self.losses, self.routing_pass
        drawn = depth is not None and depth.routing_weights is not None
        shown = drawn and routing_pass.is_open and not in_backward()
        watching = stateful_parts(self.router) if shown else []
        wanted = routing_pass.wants(charged=bool(losses))
        if not (watching or wanted):
            return
        record = depth_record(
            routing_pass,
            tokens,
            executions,
            site=self.site,
            layer_index=self.layer_index,
            depth=depth,
        )
        record = replace(
            record,
            router=self.router,
            losses=losses,
            layer_share=LAYER_SHARE,
            unit=trace if losses else None,
        )
        for part in watching:
            part.observe(record)
        if wanted:
            routing_pass.keep(record, charged=bool(losses))
