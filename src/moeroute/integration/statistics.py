"""How a model's layers used their experts: what `track_routing` collects, as tables and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeroute.ops.load import (
    co_activation,
    coefficient_of_variation,
    load_entropy,
    max_violation,
    tokens_per_expert,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

SHOWN_DEAD = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStats:
    """How one layer used its experts.

    Attributes:
        name: Full module name.
        layer_index: Position in depth, -1 if it has none.
        tokens: Tokens routed, padding left out.
        counts: (E,) int64, slots that chose each expert.
        coactivation: (E, E) int64, tokens that chose both experts of a pair.
        weight_sums: (E,) float64, total routing weight that each expert received.
    """

    name: str
    layer_index: int
    tokens: int
    counts: Tensor
    coactivation: Tensor
    weight_sums: Tensor

    @property
    def load(self) -> Tensor:
        """(E,) float64, the fraction of all slots that chose each expert."""
        return self.counts.double() / self.counts.sum().clamp(min=1)

    @property
    def mean_weights(self) -> Tensor:
        """(E,) float64, mean routing weight of the slots that chose each expert; 0 if none did."""
        return self.weight_sums / self.counts.clamp(min=1)

    @property
    def entropy(self) -> float:
        """Entropy of the load as a fraction of log(E): 1 even, 0 one expert."""
        return float(load_entropy(self.counts))

    @property
    def cv(self) -> float:
        """Coefficient of variation of the load: 0 even."""
        return float(coefficient_of_variation(self.counts))

    @property
    def max_violation(self) -> float:
        """How far the fullest expert lies over the mean, as a fraction of the mean."""
        return float(max_violation(self.counts))

    @property
    def dead_experts(self) -> tuple[int, ...]:
        """Experts that no token chose."""
        return tuple((self.counts == 0).nonzero().flatten().tolist())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "name": self.name,
            "layer_index": self.layer_index,
            "tokens": self.tokens,
            "counts": self.counts.tolist(),
            "load": self.load.tolist(),
            "mean_weights": self.mean_weights.tolist(),
            "entropy": self.entropy,
            "cv": self.cv,
            "max_violation": self.max_violation,
            "dead_experts": list(self.dead_experts),
            "coactivation": self.coactivation.tolist(),
        }


class LayerSums:
    """Running sums of one layer, on the layer's device."""

    def __init__(self, layer_index: int, size: int, device: torch.device) -> None:
        self.layer_index = layer_index
        self.size = size
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.coactivation = torch.zeros(size, size, dtype=torch.int64, device=device)
        self.weight_sums = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, chosen: Tensor, weights: Tensor, token_mask: Tensor | None) -> None:
        """Count (T, K) choices and their weights; (T,) token_mask leaves padding out."""
        self.tokens += chosen.shape[0] if token_mask is None else token_mask.sum()
        self.counts += tokens_per_expert(chosen, self.size, token_mask)
        self.coactivation += co_activation(chosen, self.size, token_mask)
        filled = (chosen >= 0) & (chosen < self.size)
        if token_mask is not None:
            filled = filled & token_mask.reshape(-1, 1)
        bins = torch.where(filled, chosen, self.size).flatten().long()
        weights = torch.where(filled, weights, 0).flatten().double()
        sums = self.weight_sums.new_zeros(self.size + 1).index_add_(0, bins, weights)
        self.weight_sums += sums[: self.size]


class RoutingStats:
    """What was routed inside a `track_routing` block; readable during the block and after it.

    Nothing waits for the device until a number is read.
    """

    def __init__(self) -> None:
        self._sums: dict[str, LayerSums] = {}

    @torch.no_grad()
    def add(
        self,
        name: str,
        layer_index: int,
        size: int,
        chosen: Tensor,
        weights: Tensor,
        token_mask: Tensor | None = None,
    ) -> None:
        """Count one call of one layer.

        Args:
            name: Full module name.
            layer_index: Position in depth.
            size: E.
            chosen: (T, K) ids; ids outside [0, size) are empty slots.
            weights: (T, K).
            token_mask: (T,) bool, False marks padding.
        """
        sums = self._sums.get(name)
        if sums is None:
            sums = self._sums[name] = LayerSums(layer_index, size, chosen.device)
        sums.add(chosen.detach(), weights.detach(), token_mask)

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._sums.clear()

    @property
    def layers(self) -> list[LayerStats]:
        """One entry a layer, in the order of their first call."""
        return [
            LayerStats(
                name=name,
                layer_index=sums.layer_index,
                tokens=int(sums.tokens),
                counts=sums.counts.cpu(),
                coactivation=sums.coactivation.cpu(),
                weight_sums=sums.weight_sums.cpu(),
            )
            for name, sums in self._sums.items()
        ]

    def summary(self) -> Table:
        """A rich table, one row a layer: print it with `rich.print(stats.summary())`."""
        from rich.table import Table

        layers = self.layers
        table = Table(title=_title(layers))
        for column, side in (
            ("layer", "left"),
            ("experts", "right"),
            ("tokens", "right"),
            ("entropy", "right"),
            ("cv", "right"),
            ("max load", "right"),
            ("min load", "right"),
            ("dead experts", "left"),
        ):
            table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
        for layer in layers:
            table.add_row(
                layer.name,
                str(len(layer.counts)),
                str(layer.tokens),
                f"{layer.entropy:.3f}",
                f"{layer.cv:.3f}",
                f"{float(layer.load.max()):.1%}",
                f"{float(layer.load.min()):.1%}",
                _dead(layer.dead_experts),
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: {"layers": [...]} as `LayerStats.to_dict` gives them."""
        return {"layers": [layer.to_dict() for layer in self.layers]}

    def plot(self, path: str | Path) -> None:
        """Draw the load as a heat map, layer by expert, relative to an even load.

        Args:
            path: Where to; the suffix decides the format (.png, .svg, .pdf).

        Raises:
            ImportError: matplotlib is missing; install moeroute[plot].
            ValueError: Nothing was routed.
        """
        from moeroute.integration.plot import plot_load

        plot_load(self.layers, path)

    def __str__(self) -> str:
        """The summary as text."""
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=120).print(self.summary())
        return text.getvalue()


def _title(layers: list[LayerStats]) -> str:
    if not layers:
        return "Routing: nothing was routed"
    return f"Routing of {len(layers)} layers; entropy 1 and cv 0 are an even load"


def _dead(experts: tuple[int, ...]) -> str:
    shown = ", ".join(str(expert) for expert in experts[:SHOWN_DEAD])
    more = len(experts) - SHOWN_DEAD
    return f"{shown} and {more} more" if more > 0 else shown or "-"
