"""`RoutingCallback`: the routing of a model in the logs of transformers' Trainer."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from moeroute.integration.doctor import has_aux_losses, reentrant_modules
from moeroute.integration.plot import check_plot
from moeroute.integration.statistics import means
from moeroute.integration.track import track_routing
from moeroute.layers.routed import routed_layers, routing_passes
from moeroute.losses.policy_gradient import NeedsCopies
from moeroute.losses.total import total_loss

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from moeroute.integration.statistics import RoutingStats


class RoutingCallback(TrainerCallback):
    """Adds the routing of the steps since the last log to Trainer's logs, as `moe/...` values.

    The values are `moe/entropy` and `moe/cv` (means over layers), `moe/max_violation` (the worst
    layer), `moe/dead_experts` (their sum) and `moe/NAME`, each auxiliary loss unweighted (the
    mean over the steps). They reach the console, `state.log_history` and every reporter. Between
    logs everything stays on the device. Evaluation is left out. In distributed training the counts
    of all processes are summed; the losses are those of the process that logs.

    Args:
        log_every: Steps between logs of the routing, at the least: the values go into the next log
            that Trainer writes. 1 puts them into every log.
        plot: Where to draw heat maps at every log of the routing, relative to the Trainer's
            output_dir: a folder, for `routing-STEP.png` in it, or one file, which is drawn anew.
            True stands for the folder "routing"; None draws none.

    Raises:
        ImportError: A plot is asked for and matplotlib is missing.
        ValueError: log_every is below 1, or the plot's suffix is unknown; or when training begins:
            auxiliary losses would be dropped (label smoothing) or lose their gradient (reentrant
            checkpointing), or the model has no routed layer.

    Example:
        >>> Trainer(model, arguments, callbacks=[moeroute.RoutingCallback(log_every=50)], ...)
    """

    def __init__(self, log_every: int = 1, plot: str | Path | bool | None = None) -> None:  # noqa: FBT001
        if log_every < 1:
            raise ValueError(f"log_every={log_every}; give a number of steps, at least 1")
        self.log_every = log_every
        self.plot = Path("routing") if plot is True else Path(plot) if plot else None
        if self.plot is not None:
            check_plot(self._plot_path(0))
        self._open = ExitStack()
        self._stats: RoutingStats | None = None
        self._losses: dict[str, Tensor] = {}
        self._loss_steps = 0
        self._last_step = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step in front of the reporters, so that they see the values."""
        _move_to_front(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what would silently go wrong, and begin to watch.

        Raises:
            ValueError: Auxiliary losses would be dropped or lose their gradient, or the model
                routes nothing.
        """
        model: nn.Module = kwargs["model"]
        _check_losses_arrive(model, args)
        _move_to_front(self)
        self._open.close()
        self._stats = self._open.enter_context(track_routing(model, coactivation=False))
        self._passes = routing_passes(model)
        self._losses, self._loss_steps, self._last_step = {}, 0, state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count again: evaluation, which runs between steps, is left out."""
        if self._stats is not None:
            self._stats.paused = False

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the losses of an accumulation step."""
        self._keep_losses()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the losses of a step, and pause."""
        self._keep_losses()
        if self._stats is not None:
            self._stats.paused = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to a training log, if enough steps have passed."""
        waited = state.global_step - self._last_step
        if logs is None or "loss" not in logs or self._stats is None or waited < self.log_every:
            return
        self._last_step = state.global_step
        values = self._read(self._stats)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        if self.plot is not None and state.is_world_process_zero and self._stats.tallies:
            path = Path(args.output_dir or ".") / self._plot_path(state.global_step)
            self._stats.plot(path, title=f"Expert load up to step {state.global_step}")
        self._stats.reset()
        self._losses, self._loss_steps = {}, 0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off the model."""
        self._open.close()
        self._stats = None

    def _plot_path(self, step: int) -> Path:
        plot = self.plot or Path()
        return plot if plot.suffix else plot / f"routing-{step}.png"

    def _keep_losses(self) -> None:
        # not `read`: that would say that somebody trains on them
        records = [record for kept in self._passes for record in kept.records.values()]
        with torch.no_grad():
            parts = total_loss(records).parts
        for name, value in parts.items():
            self._losses[name] = self._losses.get(name, 0.0) + value.detach()
        self._loss_steps += bool(parts)

    def _read(self, stats: RoutingStats) -> dict[str, float]:
        """The only place that waits for the device."""
        for tally in stats.tallies.values():
            for tensor in tally.sums():
                _sum_over_processes(tensor)
        values = {f"moe/{name}": value for name, value in means(stats.layers).items()}
        for name, value in self._losses.items():
            values[f"moe/{name}"] = value.item() / self._loss_steps
        return values


def _check_losses_arrive(model: nn.Module, args: TrainingArguments) -> None:
    ours = [loss for _, layer in routed_layers(model) for loss in layer.losses]
    by_policy_gradient = ours and all(isinstance(loss, NeedsCopies) for loss in ours)
    if by_policy_gradient or not has_aux_losses(model):  # the former checks for itself
        return
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} makes Trainer compute the loss "
            "from the logits, which drops the model's auxiliary losses. Set it to 0, or set the "
            "weights of the auxiliary losses to 0 (router_aux_loss_coef)"
        )
    reentrant = reentrant_modules(model)
    if reentrant:
        raise ValueError(
            f"reentrant activation checkpointing (first at {reentrant[0]}) takes the gradient of "
            "the auxiliary losses away. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def _sum_over_processes(tensor: Tensor) -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)


def _move_to_front(callback: TrainerCallback) -> None:
    """Put a callback first in the list that is being gone through now.

    Trainer places the callbacks of its user behind the reporters (TensorBoard and the like), which
    would report a log before the values are in it, and gives a callback no way to ask for another
    place. The handler that is calling is one frame up.
    """
    frame = sys._getframe(1).f_back
    handler = frame.f_locals.get("self") if frame is not None else None
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
