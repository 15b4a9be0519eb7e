"""Routing in the logs of `transformers.Trainer`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from moeroute.integration.track import track_routing
from moeroute.layers.routed import routed_layers, routing_passes
from moeroute.losses.total import total_loss

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from moeroute.integration.statistics import LayerStats, RoutingStats


class RoutingCallback(TrainerCallback):
    """Logs how experts are used while training, and refuses settings that would drop a loss.

    At every log of the training loss it adds, over the steps since the last one:
    `moe/entropy`, `moe/cv`, `moe/max_violation` (means over layers), `moe/dead_experts` (sum), and
    each auxiliary loss of the last forward as `moe/NAME`. Numbers are fetched from the device at
    these logs only. They land in `trainer.state.log_history` and in the logs that later callbacks
    see; to have them in a reporter too, put this callback before it:
    `trainer.callback_handler.callbacks.insert(0, RoutingCallback())`.

    Args:
        log_every: Steps between two lookups of the routing; 0 looks at every log.
        plot: Writes a heat map of the load since the last log here at each of them; a relative path
            lies in the output directory. None writes none.

    Raises:
        ValueError: When training begins: label smoothing, or reentrant checkpointing, on a model
            with auxiliary losses; or a model that routes nothing.
    """

    def __init__(self, *, log_every: int = 0, plot: str | Path | None = None) -> None:
        self.log_every = log_every
        self.plot = plot
        self._stack = ExitStack()
        self._stats: RoutingStats | None = None
        self._last = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Check the settings and begin to watch."""
        if model is None:
            raise ValueError("RoutingCallback was given no model; use it with transformers.Trainer")
        _check_arguments(args, model)
        self._stack.close()
        self._stats = self._stack.enter_context(track_routing(model))
        self._last = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Add the routing to a log of the training loss."""
        if self._stats is None or logs is None or "loss" not in logs:
            return
        if state.global_step - self._last < self.log_every:
            return
        layers = self._stats.layers
        if not layers:
            return
        values = _summary(layers) | (_losses(model) if model is not None else {})
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        if self.plot is not None and state.is_world_process_zero:
            path = Path(args.output_dir or ".") / self.plot
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stats.plot(path)
        self._stats.reset()
        self._last = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop watching."""
        self._stack.close()
        self._stats = None


def _check_arguments(args: TrainingArguments, model: nn.Module) -> None:
    charged = [name for name, layer in routed_layers(model) if layer.losses]
    if not charged:
        return
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} makes Trainer compute the loss "
            f"from the logits and drop the auxiliary losses of {len(charged)} layers (first: "
            f"{charged[0]}); set it to 0, or the losses' weights to 0"
        )
    settings = args.gradient_checkpointing_kwargs or {}
    reentrant = isinstance(settings, dict) and settings.get("use_reentrant")
    if args.gradient_checkpointing and reentrant:
        raise ValueError(
            "gradient_checkpointing_kwargs={'use_reentrant': True} takes the gradient of the "
            f"auxiliary losses of {len(charged)} layers; set use_reentrant to False"
        )


def _summary(layers: list[LayerStats]) -> dict[str, float]:
    count = len(layers)
    return {
        "moe/entropy": sum(layer.entropy for layer in layers) / count,
        "moe/cv": sum(layer.cv for layer in layers) / count,
        "moe/max_violation": sum(layer.max_violation for layer in layers) / count,
        "moe/dead_experts": float(sum(len(layer.dead_experts) for layer in layers)),
    }


@torch.no_grad()
def _losses(model: nn.Module) -> dict[str, float]:
    """The auxiliary losses of the last forward; looking at them is not using them."""
    records = [record for found in routing_passes(model) for record in found.records.values()]
    return {f"moe/{name}": float(value) for name, value in total_loss(records).parts.items()}
