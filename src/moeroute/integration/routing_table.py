"""The routing of a model as a table for the terminal."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeroute.integration.layer_labels import layer_labels
from moeroute.integration.statistics import means, total_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moeroute.integration.statistics import LayerStats

LEVELS = " ▁▂▃▄▅▆▇█"
BARS = 32
NARROWEST = 110
DEAD_SHOWN = 3
UNEVEN_CV = 1.0
FIGURES = {
    "experts": 7,
    "slots": 5,
    "entropy": 7,
    "CV": 4,
    "max viol": 8,
    "dead": 4,
    "busiest": 8,
}
"""Columns of figures and the width that each keeps on a narrow screen; only the bars are cut."""
DEPTH_WIDTH = 56
GAUGES = ("epsilon", "ERC")
NOTHING = (
    "no token was sent to an expert inside the block: call the model before it ends. Layers of "
    "soft slots send none"
)


class RoutingTable(Table):
    """A `rich` table that `print` can show as well."""

    def __str__(self) -> str:
        """The table as plain text, as wide as the terminal and at least 110 columns."""
        width = max(shutil.get_terminal_size((NARROWEST, 24)).columns, NARROWEST)
        console = Console(file=io.StringIO(), width=width, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")


def routing_table(model_name: str, layers: Sequence[LayerStats], tracked: int) -> RoutingTable:
    """One row a layer, one for the mean.

    Args:
        model_name: For the title.
        layers: What was routed; with none of them the table says so.
        tracked: How many layers were watched.
    """
    table = RoutingTable(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left"
    )
    table.title = f"Routing of {model_name}: {total_tokens(layers):,} tokens"
    if layers and all(layer.executions is not None for layer in layers):
        return fill_depth(table, layers)
    if layers and layers[0].expert_names and len({each.expert_names for each in layers}) == 1:
        return fill_named(table, layers)
    if not layers:
        table.add_column(f"{tracked} routed layers watched")
        table.add_row(NOTHING)
        return table
    pattern, labels = layer_labels([layer.name for layer in layers])
    table.add_column("layer", no_wrap=True)
    for heading, width in FIGURES.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    table.add_column("load", no_wrap=True)
    gauged = any(layer.gauge for layer in layers)
    for heading in GAUGES if gauged else ():
        table.add_column(heading, justify="right", no_wrap=True)
    for label, layer in zip(labels, layers, strict=True):
        table.add_row(label, *_cells(layer), *(_gauge_cells(layer) if gauged else ()))
    if len(layers) > 1:
        table.add_section()
        table.add_row(*_mean_row(layers), *(_mean_gauges(layers) if gauged else ()))
    table.caption = _caption(layers, tracked, pattern)
    return table


def fill_depth(table: RoutingTable, layers: Sequence[LayerStats]) -> RoutingTable:
    """One row a decoder layer: how many of the tokens skip it, run it, run it again."""
    actions = max(layer.num_experts for layer in layers)
    headings = ["skip", "run", "twice", *(f"{times} times" for times in range(3, actions))]
    pattern, labels = layer_labels([layer.name for layer in layers])
    table.min_width = DEPTH_WIDTH
    table.add_column("layer", no_wrap=True)
    for heading in (*headings[:actions], "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, layer in zip(labels, layers, strict=True):
        shares = [f"{share:.0%}" for share in layer.load.tolist()]
        shares += ["-"] * (actions - len(shares))
        table.add_row(label, *shares, f"{layer.executions:.2f}")
    table.add_section()
    total = sum((layer.executions or 0.0) * layer.layer_share for layer in layers)
    whole = sum(layer.layer_share for layer in layers)
    table.add_row("all", *[""] * actions, f"{total:.2f}")
    table.caption = f"layers: {pattern}\nruns: executions a token; {whole:g} without routing"
    if whole < len(layers):
        table.caption += "; a unit is half a layer"
    return table


def fill_named(table: RoutingTable, layers: Sequence[LayerStats]) -> RoutingTable:
    """One row a layer: the share of each of a few experts that have names."""
    pattern, labels = layer_labels([layer.name for layer in layers])
    table.min_width = DEPTH_WIDTH
    table.add_column("layer", no_wrap=True)
    for name in layers[0].expert_names:
        table.add_column(name, justify="right", no_wrap=True)
    for label, layer in zip(labels, layers, strict=True):
        table.add_row(label, *(f"{share:.0%}" for share in layer.load.tolist()))
    table.add_section()
    loads = [layer.load for layer in layers]
    table.add_row(
        "all", *(f"{sum(shares) / len(loads):.0%}" for shares in zip(*loads, strict=True))
    )
    table.caption = f"layers: {pattern}\nshare of the tokens, or of their weight in training"
    return table


def load_bars(load: Tensor) -> str:
    """One block a expert, or a group of neighbours; a dead group is a dot, an even share half high.

    Args:
        load: (E,) shares that sum to 1.
    """
    groups = load.chunk(BARS)
    even = load.shape[0]
    return "".join(_bar(group.mean().item() * even) for group in groups)


def _bar(relative: float) -> str:
    if relative == 0.0:
        return "·"
    highest = len(LEVELS) - 1
    return LEVELS[min(max(round(relative * highest / 2), 1), highest)]


def _cells(layer: LayerStats) -> tuple[str | Text, ...]:
    busiest = int(layer.load.argmax())
    return (
        str(layer.num_experts),
        "all" if layer.soft else f"{layer.slots_per_token:.3g}",
        f"{layer.entropy:.3f}",
        Text(f"{layer.cv:.2f}", style="yellow" if layer.cv > UNEVEN_CV else ""),
        f"{layer.max_violation:.2f}",
        _dead(layer.dead_experts),
        f"{busiest} ({layer.load[busiest].item():.0%})",
        load_bars(layer.load),
    )


def _gauge_cells(layer: LayerStats) -> tuple[str, str]:
    gauge = layer.gauge
    return ("-", "-") if gauge is None else (f"{gauge.epsilon:.3f}", f"{gauge.loss:.3f}")


def _mean_row(layers: Sequence[LayerStats]) -> tuple[str, ...]:
    mean = means(layers)
    dead = f"{mean['dead_experts']:.0f}"
    return (
        "all",
        "",
        "",
        f"{mean['entropy']:.3f}",
        f"{mean['cv']:.2f}",
        f"{mean['max_violation']:.2f}",
        dead,
        "",
        "",
    )


def _mean_gauges(layers: Sequence[LayerStats]) -> tuple[str, str]:
    gauges = [layer.gauge for layer in layers if layer.gauge]
    epsilon = sum(gauge.epsilon for gauge in gauges) / len(gauges)
    return f"{epsilon:.3f}", f"{sum(gauge.loss for gauge in gauges) / len(gauges):.3f}"


def _dead(ids: tuple[int, ...]) -> Text:
    if not ids:
        return Text("0")
    shown = f" ({','.join(map(str, ids))})" if len(ids) <= DEAD_SHOWN else ""
    return Text(f"{len(ids)}{shown}", style="red")


def _caption(layers: Sequence[LayerStats], tracked: int, pattern: str) -> str:
    notes = ["an even load: entropy 1, CV 0, max viol 0, bars half high"]
    if len(layers) > 1:
        notes.insert(0, f"layers: {pattern}")
        means_too = ", mean, mean" if any(layer.gauge for layer in layers) else ""
        notes.append(f"last row: mean, mean, largest, sum{means_too}")
    if any(layer.soft for layer in layers):
        notes.append("slots all: every token takes every expert; load is the share of weight")
    if any(layer.executions is not None for layer in layers):
        notes.append("decoder layers: experts are actions, 0 to skip, 1 to run, 2 to run twice")
    if any(layer.gauge for layer in layers):
        notes.append("epsilon 0.71: orthogonal router rows; ERC 0: experts know their own rows")
    if len(layers) < tracked:
        notes.append(f"{tracked - len(layers)} more routed layers saw no token")
    return "\n".join(notes)
