"""Draws how often each decoder layer ran: layers from top to bottom, actions side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moeroute.integration.layer_labels import layer_labels
from moeroute.integration.plot import check_plot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeroute.integration.layer_stats import LayerStats

NAMES = ("skip", "run", "run twice")
INCHES = (5.5, 1.3, 0.26)  # width, height without rows, height of a row
MOST_INCHES = 14.0
DOTS_PER_INCH = 160
BRIGHT = 0.6


def plot_depth(layers: Sequence[LayerStats], path: str | Path, *, title: str) -> None:
    """Draw the share of tokens that each action got in each layer.

    Args:
        layers: Of decoder layers, in order from top to bottom.
        path: Where to; .png, .svg or .pdf. Missing folders are made.
        title: Shown above the map.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The suffix is none of the three.
    """
    figure_class = check_plot(path)
    columns = max(layer.num_experts for layer in layers)
    shares = torch.zeros(len(layers), columns)
    for row, layer in zip(shares, layers, strict=True):
        row[: layer.num_experts] = layer.load
    height = min(INCHES[1] + INCHES[2] * len(layers), MOST_INCHES)
    figure = figure_class(figsize=(INCHES[0], height), layout="constrained", dpi=DOTS_PER_INCH)
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_title(title, fontsize=10, loc="left", pad=8)
    pattern, labels = layer_labels([layer.name for layer in layers])
    axes.set_yticks(range(len(labels)), labels)
    names = [*NAMES, *(f"{times} times" for times in range(len(NAMES), columns))]
    axes.set_xticks(range(columns), names[:columns])
    axes.set_ylabel(pattern, fontsize=9)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    for row, layer in enumerate(shares.tolist()):
        for action, share in enumerate(layer):
            colour = "white" if share > BRIGHT else "#333333"
            told = f"{share:.0%}" if share else ""
            axes.text(action, row, told, ha="center", va="center", fontsize=7, color=colour)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
