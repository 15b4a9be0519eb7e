"""The load of every layer's experts as a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeroute.integration.layer_labels import layer_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from torch import Tensor

    from moeroute.integration.statistics import LayerStats

SUFFIXES = (".png", ".svg", ".pdf")
DOTS_PER_INCH = 150
CELL = 0.34  # inches
WIDTHS = (6.4, 13.0)  # least and most, inches
HEIGHTS = (2.3, 15.0)
MARGIN = (2.3, 1.55)
LABEL_INCHES = 0.19
WRITTEN_CELL = 0.3  # inches a cell must have for its number to be written
BRIGHT = 0.55  # share of the colour scale from which a number is written in white
TOPS = (2.0, 5.0)  # least and most end of the colour scale


def plot_load(layers: Sequence[LayerStats], path: str | Path, *, title: str) -> None:
    """Draw load relative to an even share: one row a layer, one column an expert.

    1 is an even share; the scale ends at the largest load, at least 2 and at most 5. An expert that
    no token chose bears a cross. Layers may differ in their number of experts.

    Args:
        layers: What was routed, in order from top to bottom.
        path: Where to; .png, .svg or .pdf. Missing folders are made.
        title: Shown above the map.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There are no layers, or the suffix is none of the three.
    """
    figure_class = check_plot(path)
    target = Path(path)
    if not layers:
        raise ValueError("there is nothing to plot: no token was routed inside the block")
    relative = relative_load(layers)
    width, height = _size(*relative.shape)
    figure = figure_class(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)
    axes = figure.add_subplot()
    image = _draw(axes, relative, layers)
    axes.set_title(title, fontsize=11, loc="left", pad=10)
    bar = figure.colorbar(
        image,
        ax=axes,
        fraction=0.05,
        pad=0.015,
        aspect=max(8, 6 * height),
        extend="max" if relative.nan_to_num(0.0).max() > TOPS[1] else "neither",
        extendfrac=0.02,
    )
    bar.set_label("load / even share", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def check_plot(path: str | Path) -> Any:
    """Make sure that a plot can be written in this format.

    Returns:
        matplotlib's Figure class.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The suffix is none of .png, .svg and .pdf.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"cannot write {path}: a plot's suffix is one of {', '.join(SUFFIXES)}, not {suffix!r}"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting needs matplotlib, which is not installed; install it with "
            "`pip install 'moeroute[plot]'`"
        ) from error
    return Figure


def relative_load(layers: Sequence[LayerStats]) -> Tensor:
    """(layers, largest E) load times E, so that an even share is 1; NaN where no expert is."""
    widest = max(layer.num_experts for layer in layers)
    table = torch.full((len(layers), widest), float("nan"))
    for row, layer in zip(table, layers, strict=True):
        row[: layer.num_experts] = layer.load * layer.num_experts
    return table


def _size(rows: int, columns: int) -> tuple[float, float]:
    width = min(max(MARGIN[0] + CELL * columns, WIDTHS[0]), WIDTHS[1])
    return width, min(max(MARGIN[1] + CELL * rows, HEIGHTS[0]), HEIGHTS[1])


def _top(relative: Tensor) -> float:
    return min(max(relative.nan_to_num(0.0).max().item(), TOPS[0]), TOPS[1])


def _draw(axes: Axes, relative: Tensor, layers: Sequence[LayerStats]) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    rows, columns = relative.shape
    top = _top(relative)
    image = axes.imshow(
        relative.numpy(),
        cmap=colormaps["RdBu_r"].with_extremes(bad="white"),
        norm=TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top),
        aspect="auto",
        interpolation="nearest",
    )
    axes.spines[:].set_visible(False)
    inches = [size - margin for size, margin in zip(_size(rows, columns), MARGIN, strict=True)]
    cell = (inches[0] / columns, inches[1] / rows)
    if min(cell) > WRITTEN_CELL / 3:
        axes.set_xticks([edge + 0.5 for edge in range(columns - 1)], minor=True)
        axes.set_yticks([edge + 0.5 for edge in range(rows - 1)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0, labelsize=8)
    _label(axes, layers, cell)
    written = cell[0] >= WRITTEN_CELL and cell[1] >= WRITTEN_CELL * 0.6
    _mark(axes, relative, layers, top=top, written=written)
    return image


def _label(axes: Axes, layers: Sequence[LayerStats], cell: tuple[float, float]) -> None:
    pattern, labels = layer_labels([layer.name for layer in layers])
    columns = max(layer.num_experts for layer in layers)
    every = _step(LABEL_INCHES * (1 + len(str(columns)) / 3) / cell[0])
    shown = range(0, columns, every)
    axes.set_xticks(list(shown), [str(expert) for expert in shown])
    every = _step(LABEL_INCHES / cell[1])
    shown = range(0, len(labels), every)
    axes.set_yticks(list(shown), [labels[row] for row in shown])
    crossed = any(layer.dead_experts for layer in layers)
    axes.set_xlabel("expert (×: chosen by no token)" if crossed else "expert", fontsize=9)
    axes.set_ylabel(pattern, fontsize=9)


def _step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that is at least this."""
    scale = 1
    while True:
        for factor in (1, 2, 5):
            if factor * scale >= least:
                return factor * scale
        scale *= 10


def _mark(
    axes: Axes, relative: Tensor, layers: Sequence[LayerStats], *, top: float, written: bool
) -> None:
    """Write the numbers where cells are wide enough; cross out dead experts everywhere."""
    dead = [(expert, row) for row, layer in enumerate(layers) for expert in layer.dead_experts]
    if dead:
        size = 18 if written else 4
        axes.scatter(*zip(*dead, strict=True), marker="x", c="white", s=size, linewidths=0.9)
    if not written:
        return
    crossed = set(dead)
    for row, layer in enumerate(layers):
        for expert in range(layer.num_experts):
            if (expert, row) in crossed:
                continue
            value = relative[row, expert].item()
            strength = 1 - value if value < 1 else (value - 1) / (top - 1)
            colour = "white" if strength > BRIGHT else "#333333"
            axes.text(
                expert, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour
            )
