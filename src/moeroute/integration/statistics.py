"""What was routed where, as numbers: added up on the device, read when somebody asks.

Axes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeroute.integration.layer_stats import LayerStats as LayerStats
from moeroute.integration.layer_stats import LayerTally
from moeroute.integration.layer_stats import layer_index as layer_index

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from moeroute.integration.coupling import CouplingGauge
    from moeroute.integration.routing_table import RoutingTable


class RoutingStats:
    """The routing of a model's layers, as `track_routing` gathers it.

    Reading anything waits for the device; gathering does not. `print(stats)` shows the summary.

    Args:
        model_name: Name of the model's class, for titles.
        names: Full module names of the layers that can be seen, in module order.
        coactivation: Whether to count which experts are chosen together.
    """

    def __init__(self, model_name: str, names: Sequence[str], *, coactivation: bool = True) -> None:
        self.model_name = model_name
        self.names = tuple(names)
        self.tallies: dict[str, LayerTally] = {}
        self.paused = False
        self.gauges: Callable[[], Mapping[str, CouplingGauge]] = dict
        self._coactivation = coactivation
        self._of_depth: dict[str, float] = {}
        self._expert_names: dict[str, tuple[str, ...]] = {}

    def add(
        self,
        name: str,
        num_experts: int,
        ids: Tensor,
        weights: Tensor,
        token_mask: Tensor | None = None,
        *,
        layer_share: float | None = None,
        expert_names: tuple[str, ...] = (),
    ) -> None:
        """Add one call of a layer, without waiting for the device; nothing while `paused`.

        Args:
            name: Full module name of the layer.
            num_experts: E.
            ids: (T, K) integers; anything outside [0, E) is an empty slot.
            weights: (T, K), any floating dtype.
            token_mask: (T,) bool, False marks padding; None counts every token.
            layer_share: Where the experts are actions of a decoder layer, the part of it that they
                speak of; else None.
            expert_names: What the experts are called, by id, if they have names.
        """
        if self.paused:
            return
        if layer_share is not None:
            self._of_depth[name] = layer_share
        if expert_names:
            self._expert_names[name] = expert_names
        with torch.inference_mode(False), torch.no_grad():
            tally = self.tallies.get(name)
            if tally is not None and tally.counts.shape[0] != num_experts:
                self.add(f"{name} ({num_experts} experts)", num_experts, ids, weights, token_mask)
                return
            if tally is None:
                tally = LayerTally(num_experts, ids.device, coactivation=self._coactivation)
                self.tallies[name] = tally
            tally.add(ids.detach(), weights.detach(), token_mask)

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.tallies = {}

    @property
    def layers(self) -> tuple[LayerStats, ...]:
        """One entry a layer that has routed something, in module order."""
        place = {name: index for index, name in enumerate(self.names)}
        ordered = sorted(self.tallies, key=lambda name: place.get(name, len(place)))
        gauges = {block_of(name): gauge for name, gauge in self.gauges().items()}
        return tuple(
            replace(
                self.tallies[name].read(name),
                gauge=gauges.get(block_of(name)),
                executions=self._executions(name),
                layer_share=self._of_depth.get(name, 1.0),
                expert_names=self._expert_names.get(name, ()),
            )
            for name in ordered
        )

    @property
    def layers_executed(self) -> float | None:
        """Runs of decoder layers a token, summed over layers; None where no depth is routed.

        A run of one of a layer's two units counts half.
        """
        runs = [
            layer.executions * layer.layer_share
            for layer in self.layers
            if layer.executions is not None
        ]
        return sum(runs) if runs else None

    def _executions(self, name: str) -> float | None:
        if name not in self._of_depth:
            return None
        counts = self.tallies[name].counts.cpu().double()
        runs = (counts * torch.arange(len(counts))).sum() / counts.sum().clamp(min=1)
        return runs.item()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that `json.dumps` takes.

        Returns:
            "model", "tracked_layers" (names) and "layers", a list of `LayerStats.to_dict()`.
        """
        return {
            "model": self.model_name,
            "tracked_layers": list(self.names),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def summary(self) -> RoutingTable:
        """A `rich.table.Table` with one row a layer; plain `print` shows it too."""
        from moeroute.integration.routing_table import routing_table

        return routing_table(self.model_name, self.layers, len(self.names))

    def plot(self, path: str | Path, *, title: str | None = None) -> None:
        """Draw load by layer and expert, relative to an even share, into a file.

        Where depth alone is routed it is the share of tokens by layer and action.

        Args:
            path: Where to; the suffix chooses .png, .svg or .pdf. Missing folders are made.
            title: Shown above the map; by default the model's class and the number of tokens.

        Raises:
            ImportError: matplotlib is missing; it says how to install it.
            ValueError: Nothing was routed, or the suffix is none of the three.
        """
        from moeroute.integration.depth_plot import plot_depth
        from moeroute.integration.plot import plot_load

        layers = self.layers
        if layers and all(layer.executions is not None for layer in layers):
            told = f"Depth of {self.model_name}, {total_tokens(layers):,} tokens"
            plot_depth(layers, path, title=title or told)
            return
        plot_load(layers, path, title=title or _plot_title(self.model_name, layers))

    def __str__(self) -> str:
        """Show the summary as text."""
        return str(self.summary())


def block_of(name: str) -> str:
    """The block around a gate or experts; any other name as it is."""
    block, _, last = name.rpartition(".")
    return block if last in ("experts", "gate", "router") else name


def total_tokens(layers: Sequence[LayerStats]) -> int:
    """Tokens that went through the model: the most that any layer saw."""
    return max((layer.tokens for layer in layers), default=0)


def means(layers: Sequence[LayerStats]) -> Mapping[str, float]:
    """Balance over layers: mean entropy and CV, largest violation, sum of dead experts."""
    count = max(len(layers), 1)
    return {
        "entropy": sum(layer.entropy for layer in layers) / count,
        "cv": sum(layer.cv for layer in layers) / count,
        "max_violation": max((layer.max_violation for layer in layers), default=0.0),
        "dead_experts": float(sum(len(layer.dead_experts) for layer in layers)),
    }


def _plot_title(model_name: str, layers: Sequence[LayerStats]) -> str:
    return f"Expert load in {model_name}, {total_tokens(layers):,} tokens"
