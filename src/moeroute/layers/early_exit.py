"""A decoder layer before which sequences and tokens may leave the model.

Axes: B batch, S sequence, H hidden, N tokens that have a target, R rank.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moeroute.layers.depth import run_actions
from moeroute.layers.depth_record import depth_record
from moeroute.losses.early_exit import IGNORED, ExitLoss, ExitRecord
from moeroute.routing_pass import RoutingPass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moeroute.depth_types import DecoderCall, DepthOutput, DepthRecord
    from moeroute.layers.exit_schedule import ExitClock, ExitSchedule
    from moeroute.routers.confidence import ConfidenceRouter


class ExitTransform(nn.Module):
    """h + U D h: what a state goes through on its way out, the identity at first.

    Args:
        in_features: H.
        rank: R.

    Shapes:
        hidden_states: (..., H), any floating dtype, which the output has too; down: (R, H); up:
            (H, R), zero at first.
    """

    def __init__(self, in_features: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(in_features, rank))
        nn.init.normal_(self.down, std=in_features**-0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The states to read out."""
        wide = hidden_states.to(self.down.dtype)
        moved = linear(linear(wide, self.down), self.up)
        return hidden_states + moved.to(hidden_states.dtype)


class EarlyExitLayer(nn.Module):
    """Leaves out a decoder layer, and teaches the model to do without it.

    In evaluation all tokens skip this layer and all later ones from `exit_layer` on: these compute
    and keep nothing. Below it the router stops tokens one by one; a token that has stopped gives
    its keys and values to later layers all the same, those of the state that it left with.

    In training no one leaves. Each sequence skips the layer at the schedule's rate; the draw is
    that of torch's generator of the CPU, so that nothing waits for the device and a recomputation
    under activation checkpointing draws the same. The states that would leave before this layer
    are kept for `ExitLoss` where its turn has come.

    Args:
        router: Says which tokens stop.
        schedule: Rates and weights by step.
        clock: Knows the step; its owner among the layers has it among its modules.
        transform: (..., H) to (..., H), what states leave through; None leaves them.
        exit_layer: Layers that run; None: all.
        site: Full module name of the decoder layer.
        layer_index: Its place among the decoder layers, which is the number of those before it.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; the output has its shape.

    Warns:
        UserWarning: A training forward without labels, from which exits learn nothing.
    """

    def __init__(
        self,
        *,
        router: ConfidenceRouter,
        schedule: ExitSchedule,
        clock: ExitClock,
        transform: nn.Module | None = None,
        exit_layer: int | None = None,
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.transform = transform
        self.schedule = schedule
        self.exit_layer = exit_layer
        self.site = site
        self.layer_index = layer_index
        self.losses = (ExitLoss(exit_layer=layer_index),) * (layer_index in schedule.taught())
        self.routing_pass = RoutingPass()
        self._clock = (clock,)  # not a submodule of all layers, but of one
        if clock.owner == site:
            self.clock = clock

    def forward(self, hidden_states: Tensor, call: DecoderCall) -> Tensor:
        """Answer in place of the decoder layer."""
        batch = hidden_states.shape[0]
        if self.training:
            return self._train(hidden_states, call)
        if self.exit_layer is not None and self.layer_index >= self.exit_layer:
            if self.layer_index == self.exit_layer:
                hidden_states = self._leaving(hidden_states, self._running(hidden_states))
            return self._act(hidden_states, call, (0,) * batch)
        if self.router.threshold is None:
            return self._act(hidden_states, call, (1,) * batch)
        return self._run_the_unsure(hidden_states, call)

    def _train(self, hidden_states: Tensor, call: DecoderCall) -> Tensor:
        clock, batch = self._clock[0], hidden_states.shape[0]
        if clock.owner == self.site and self.routing_pass.is_open and torch.is_grad_enabled():
            clock.tick()
            if self.schedule.taught() and self.routing_pass.targets is None:
                warnings.warn(
                    "early exits learn from labels and this training forward was given none; pass "
                    "`labels` to the model, or set EarlyExit.loss_scale to 0",
                    stacklevel=2,
                )
        rate = self.schedule.dropout(self.layer_index, clock.now)
        runs = torch.rand(batch) >= rate if rate else torch.ones(batch)
        return self._act(hidden_states, call, tuple(runs.long().tolist()))

    def _act(self, hidden_states: Tensor, call: DecoderCall, actions: tuple[int, ...]) -> Tensor:
        """The same for all tokens of a sequence."""
        call.decide(actions, from_tokens=False)
        self._keep(hidden_states, torch.tensor(actions, device=hidden_states.device))
        return run_actions(hidden_states, call, actions)

    def _run_the_unsure(self, hidden_states: Tensor, call: DecoderCall) -> Tensor:
        running = self._running(hidden_states)
        left = self._leaving(hidden_states, running)
        depth = self.router(self.routing_pass.router_input(left, self.site))
        if depth.state is not None:
            self.routing_pass.hand_on(self.site, depth.state)
        self._keep(hidden_states, depth.num_executions, depth)
        runs = depth.num_executions > 0  # (B, S)
        return call.run_tokens(torch.where(runs[..., None], hidden_states, left), runs, 0, "all")

    def _running(self, hidden_states: Tensor) -> Tensor:
        """(B, S) bool: the tokens that have not stopped before this layer."""
        state = self.routing_pass.router_input(hidden_states, self.site).state
        if state is None:
            return torch.ones_like(hidden_states[..., 0], dtype=torch.bool)
        return (state[:, 0] == 0).reshape(hidden_states.shape[:2])

    def _leaving(self, hidden_states: Tensor, running: Tensor) -> Tensor:
        """The states with which tokens would leave here; those that left before stay."""
        if self.transform is None:
            return hidden_states
        return torch.where(running[..., None], self.transform(hidden_states), hidden_states)

    def _keep(
        self, hidden_states: Tensor, executions: Tensor, depth: DepthOutput | None = None
    ) -> None:
        step, teaches = self._clock[0].now, self.training and bool(self.losses)
        weight = self.schedule.weight(self.layer_index, step) if teaches else 0.0
        targets = self.routing_pass.targets if weight else None
        if not self.routing_pass.wants(charged=targets is not None):
            return
        record = depth_record(
            self.routing_pass,
            hidden_states,
            executions,
            site=self.site,
            layer_index=self.layer_index,
            depth=depth,
        )
        if targets is not None:
            record = self._taught(record, hidden_states, targets, weight)
        self.routing_pass.keep(record, charged=targets is not None)

    def _taught(
        self, record: DepthRecord, hidden_states: Tensor, targets: Tensor, weight: float
    ) -> ExitRecord:
        """The record with the states of the tokens that have a target."""
        read_out = self.routing_pass.read_out
        if read_out is None:
            raise RuntimeError(f"{self.site}: targets were given but no way to read tokens out")
        targets = targets.to(hidden_states.device)
        counted = targets != IGNORED
        states = hidden_states[counted]  # (N, H)
        known = {field.name: getattr(record, field.name) for field in fields(record)}
        known |= {
            "experts": self.transform,
            "losses": (ExitLoss(exit_layer=self.layer_index, weight=weight),),
        }
        return ExitRecord(
            **known,
            states=states if self.transform is None else self.transform(states),
            targets=targets[counted],
            read_out=read_out,
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"exit_layer={self.exit_layer}"


@contextmanager
def exit_at(
    model: nn.Module, exit_layer: int | None = None, *, threshold: float | None = None
) -> Iterator[None]:
    """Fix where a model that `EarlyExit` has wrapped is left, for every call inside the block.

    Args:
        model: What `moeroute.wrap_model` returned.
        exit_layer: Layers that run; None: all.
        threshold: Probability at which a token stops; None: no token stops by itself.

    Raises:
        ValueError: The model has no exits, or a number is out of range.

    Example:
        >>> with exit_at(wrapped, 8):
        ...     wrapped.generate(input_ids, max_new_tokens=20)
    """
    layers = [module for module in model.modules() if isinstance(module, EarlyExitLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no exits; wrap it with moeroute.methods.EarlyExit, or "
            "skip its last layers with moeroute.force_depth"
        )
    check_exit(exit_layer, layers[0].schedule.num_layers, first=layers[0].layer_index)
    if threshold is not None and not threshold >= 0.0:
        raise ValueError(f"threshold={threshold} is below 0; it is a probability")
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(setattr, layer, "exit_layer", layer.exit_layer)
            stack.callback(setattr, layer.router, "threshold", layer.router.threshold)
            layer.exit_layer, layer.router.threshold = exit_layer, threshold
        yield


def check_exit(exit_layer: int | None, num_layers: int, *, first: int = 0) -> None:
    """Raise ValueError if a model cannot be left after so many layers."""
    least = max(first, 1)
    if exit_layer is not None and not least <= exit_layer <= num_layers:
        raise ValueError(
            f"exit_layer={exit_layer} is outside {least}..{num_layers}, the numbers of layers "
            "after which this model can be left"
        )
