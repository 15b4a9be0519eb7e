"""The heat map of expert load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moeroute.integration.statistics import LayerStats

MOST_LABELS = 40
BRIGHTEST = 3.0


def plot_load(layers: Sequence[LayerStats], path: str | Path) -> None:
    """Draw layer by expert, the colour being load relative to an even one; dead experts are marked.

    Args:
        layers: One row each; layers may differ in their number of experts.
        path: Where to; the suffix decides the format.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There are no layers.
    """
    if not layers:
        raise ValueError(
            "nothing was routed, so there is no load to plot; run the model inside "
            "`with moeroute.track_routing(model)`"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'moeroute[plot]'") from error
    widest = max(len(layer.counts) for layer in layers)
    relative = torch.full((len(layers), widest), float("nan"), dtype=torch.float64)
    for row, layer in enumerate(layers):
        relative[row, : len(layer.counts)] = layer.load * len(layer.counts)
    size = (min(3.5 + 0.28 * widest, 16.0), min(1.8 + 0.28 * len(layers), 20.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    top = max(2.0, min(BRIGHTEST, float(relative.nan_to_num(0.0).max())))
    image = axes.imshow(relative.numpy(), aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
    rows, columns = (relative == 0).nonzero(as_tuple=True)
    if len(rows):
        axes.scatter(columns, rows, marker="x", color="tomato", s=18, label="chosen by no token")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=8)
    axes.set_xlabel("expert")
    axes.set_xticks(range(0, widest, max(1, widest // 16)))
    step = max(1, -(-len(layers) // MOST_LABELS))
    axes.set_yticks(range(0, len(layers), step), _labels(layers)[::step], fontsize=8)
    axes.set_title("load of each expert", fontsize=10, loc="right")
    figure.colorbar(image, ax=axes, extend="max", label="load / even load")
    figure.savefig(path, dpi=150)


def _labels(layers: Sequence[LayerStats]) -> list[str]:
    """Module names without what all of them share at either end."""
    parts = [layer.name.split(".") for layer in layers]
    while len(layers) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while len(layers) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return [".".join(p) for p in parts]
