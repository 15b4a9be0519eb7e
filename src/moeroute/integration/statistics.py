"""What was routed where, as numbers: added up on the device, read when somebody asks.

Axes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeroute.ops.load import (
    co_activation,
    coefficient_of_variation,
    dead_experts,
    load_entropy,
    max_violation,
    tokens_per_expert,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from moeroute.integration.coupling import CouplingGauge
    from moeroute.integration.routing_table import RoutingTable


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerStats:
    """The routing of one layer over all tokens seen; tensors are on the CPU.

    Attributes:
        name: Full module name of the layer.
        layer_index: Position in depth, -1 if the name holds none.
        tokens: Tokens routed, padding left out.
        counts: (E,) int64, filled slots of each expert.
        load: (E,) float32, each expert's share, sums to 1: of the slots, or of the routing weight
            where the layer is `soft`.
        mean_weight: (E,) float32, mean routing weight over the slots of each expert, 0 where it has
            none.
        entropy: Entropy of `load` as a fraction of its maximum, 1 at perfect balance.
        cv: Standard deviation of `load` divided by its mean, 0 at perfect balance.
        max_violation: Largest load divided by the mean load, minus 1; 0 at perfect balance.
        dead_experts: Ids of the experts that no token chose.
        coactivation: (E, E) int64, tokens that chose both experts of a pair; None if not counted.
        soft: True if every token took every expert, so that slots say nothing about balance.
        gauge: How specialised router and experts are, where `track_routing` was asked for it and
            the layer can be read.
    """

    name: str
    layer_index: int
    tokens: int
    counts: Tensor
    load: Tensor
    mean_weight: Tensor
    entropy: float
    cv: float
    max_violation: float
    dead_experts: tuple[int, ...]
    coactivation: Tensor | None
    soft: bool
    gauge: CouplingGauge | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[0]

    @property
    def slots_per_token(self) -> float:
        """Mean number of filled slots a token: K, or less where slots stay empty."""
        return int(self.counts.sum()) / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "name": self.name,
            "layer_index": self.layer_index,
            "num_experts": self.num_experts,
            "tokens": self.tokens,
            "slots_per_token": self.slots_per_token,
            "counts": self.counts.tolist(),
            "load": self.load.tolist(),
            "mean_weight": self.mean_weight.tolist(),
            "entropy": self.entropy,
            "cv": self.cv,
            "max_violation": self.max_violation,
            "dead_experts": list(self.dead_experts),
            "coactivation": None if self.coactivation is None else self.coactivation.tolist(),
            "soft": self.soft,
            "gauge": None if self.gauge is None else asdict(self.gauge),
        }


class LayerTally:
    """Running sums of one layer; nothing here waits for the device.

    Args:
        num_experts: E.
        device: Where the sums live.
        coactivation: Whether to count pairs, an (E, E) table.
    """

    def __init__(self, num_experts: int, device: torch.device, *, coactivation: bool) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.weights = torch.zeros(num_experts, dtype=exact, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.pairs = torch.zeros_like(self.counts).repeat(num_experts, 1) if coactivation else None

    def add(self, ids: Tensor, weights: Tensor, token_mask: Tensor | None) -> None:
        """Add (T, K) ids and weights of tokens, those where the (T,) mask is False left out."""
        size = self.counts.shape[0]
        ids, weights = ids.to(self.counts.device), weights.to(self.counts.device)
        if token_mask is not None:
            token_mask = token_mask.to(self.counts.device)
        self.counts += tokens_per_expert(ids, size, token_mask)
        if self.pairs is not None:
            self.pairs += co_activation(ids, size, token_mask)
        filled = (ids >= 0) & (ids < size)
        if token_mask is not None:
            filled = filled & token_mask[:, None]
        amounts = torch.where(filled, weights.abs().to(self.weights.dtype), 0.0).reshape(-1)
        groups = torch.where(filled, ids, size).reshape(-1).to(torch.int64)
        self.weights += (
            torch.zeros_like(self.weights[:1])
            .repeat(size + 1)
            .scatter_add(0, groups, amounts)[:size]
        )
        self.tokens += ids.shape[0] if token_mask is None else token_mask.sum()

    def sums(self) -> tuple[Tensor, ...]:
        """The tensors that add up over processes."""
        return (self.counts, self.weights, self.tokens)

    def read(self, name: str) -> LayerStats:
        """Fetch the sums and derive the rest; waits for the device."""
        counts, weights, tokens = self.counts.cpu(), self.weights.cpu(), int(self.tokens)
        soft = counts.shape[0] > 1 and tokens > 0 and bool((counts == tokens).all())
        usage = weights if soft else counts
        return LayerStats(
            name=name,
            layer_index=layer_index(name),
            tokens=tokens,
            counts=counts,
            load=(usage / usage.sum().clamp(min=torch.finfo(torch.float32).tiny)).float(),
            mean_weight=(weights / counts.clamp(min=1)).float(),
            entropy=load_entropy(usage).item(),
            cv=coefficient_of_variation(usage).item(),
            max_violation=max_violation(usage).item(),
            dead_experts=tuple(dead_experts(counts).nonzero().flatten().tolist()) if tokens else (),
            coactivation=None if self.pairs is None else self.pairs.cpu(),
            soft=soft,
        )


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

    def add(
        self,
        name: str,
        num_experts: int,
        ids: Tensor,
        weights: Tensor,
        token_mask: Tensor | None = None,
    ) -> None:
        """Add one call of a layer, without waiting for the device; nothing while `paused`.

        Args:
            name: Full module name of the layer.
            num_experts: E.
            ids: (T, K) integers; anything outside [0, E) is an empty slot.
            weights: (T, K), any floating dtype.
            token_mask: (T,) bool, False marks padding; None counts every token.
        """
        if self.paused:
            return
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
            replace(self.tallies[name].read(name), gauge=gauges.get(block_of(name)))
            for name in ordered
        )

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

        Args:
            path: Where to; the suffix chooses .png, .svg or .pdf. Missing folders are made.
            title: Shown above the map; by default the model's class and the number of tokens.

        Raises:
            ImportError: matplotlib is missing; it says how to install it.
            ValueError: Nothing was routed, or the suffix is none of the three.
        """
        from moeroute.integration.plot import plot_load

        plot_load(self.layers, path, title=title or _plot_title(self.model_name, self.layers))

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


def layer_index(name: str) -> int:
    """The first number that stands alone in a dotted name, -1 if there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else -1


def _plot_title(model_name: str, layers: Sequence[LayerStats]) -> str:
    return f"Expert load in {model_name}, {total_tokens(layers):,} tokens"
