"""Throughput over the number of tokens, beside the line that the device allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import OURS
from benchmarks.floors import Row, is_wrong
from benchmarks.registry import BENCHMARKS
from benchmarks.roofline import TIMED, Key, operations
from moeroute.integration.plot import DOTS_PER_INCH, check_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

__all__ = ["panels", "plot_throughput"]

PANEL = (4.1, 3.1)  # inches
LEGEND_INCHES = 1.7
COLUMNS = 4
TERA = 1e12
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
OUR_COLOUR = "#c1121f"
MARKERS = "sD^vP*Xd"
OUR_FORM = {"color": OUR_COLOUR, "marker": "o", "linewidth": 2.2, "zorder": 5}
LIMIT_FORM = {"color": "#333333", "linestyle": "--", "linewidth": 1.2}
LINE_COLOURS = ("#555555", "#aaaaaa")
"""Of providers that are no peers but lines to compare with."""
WIDE = 100.0
"""From this ratio of the ends of a scale on, powers of ten alone are labelled."""

PanelKey = tuple[str, str, str, str, str]


def panels(rows: Sequence[Row]) -> dict[PanelKey, list[Row]]:
    """Gather the timed rows that differ in T alone.

    Args:
        rows: Of one run.

    Returns:
        By op, shape, mode, dtype and routing, in the order of the run; each list from few tokens to
        many.
    """
    found: dict[PanelKey, list[Row]] = {}
    for row in rows:
        op, mode, shape, _, dtype, routing = row.key
        if mode in TIMED:
            found.setdefault((op, shape, mode, dtype, routing), []).append(row)
    return {key: sorted(group, key=lambda row: row.key[3]) for key, group in found.items()}


def plot_throughput(
    rows: Sequence[Row], limits: Mapping[Key, float], path: str | Path, *, title: str
) -> None:
    """Draw one panel per shape and mode: TFLOP/s over T of every provider, and the limit.

    Both axes are logarithmic. The operations are those of the op itself, so that a provider which
    multiplies more than it must is not the faster for it. Wrong answers have no point.

    Args:
        rows: Of one run.
        limits: Milliseconds that a row needs at the least, by its key.
        path: Where to; .png, .svg or .pdf. Missing folders are made.
        title: Shown above the panels.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no row was timed, or the suffix is none of the three.
    """
    figure_class = check_plot(path)
    groups = panels(rows)
    if not groups:
        raise ValueError("there is nothing to plot: no row of fwd or fwd_bwd was timed")
    columns = min(COLUMNS, len(groups))
    lines = -(-len(groups) // columns)
    width = PANEL[0] * columns + LEGEND_INCHES
    figure = figure_class(
        figsize=(width, PANEL[1] * lines + 0.5), layout="constrained", dpi=DOTS_PER_INCH
    )
    grid = figure.subplots(lines, columns, squeeze=False)
    named: dict[str, Line2D] = {}
    for place, (axes, (key, group)) in enumerate(zip(grid.flat, groups.items(), strict=False)):
        _draw(axes, key, group, limits, named)
        if place % columns == 0:
            axes.set_ylabel("TFLOP/s", fontsize=9)
    for axes in list(grid.flat)[len(groups) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.legend(
        named.values(), named.keys(), loc="outside right upper", fontsize=9, frameon=False
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def _draw(
    axes: Axes,
    key: PanelKey,
    rows: Sequence[Row],
    limits: Mapping[Key, float],
    named: dict[str, Line2D],
) -> None:
    op, shape, mode, dtype, routing = key
    tokens = [row.key[3] for row in rows]
    bound = [operations(row.key) / (1e-3 * limits[row.key]) / TERA for row in rows]
    # a line alone would not show where there is one T
    named["limit"] = axes.plot(tokens, bound, **LIMIT_FORM, marker="_", label="limit")[0]
    peers = [provider.name for provider in BENCHMARKS[op].providers if provider.name != OURS]
    for name in (OURS, *peers):
        points = _points(rows, name)
        if points:
            form = OUR_FORM if name == OURS else _form(name)
            named[name] = axes.plot(*zip(*points, strict=True), **form, label=name)[0]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _label_throughput(axes)
    axes.set_xticks(tokens, [str(count) for count in tokens], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.tick_params(labelsize=8)
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens", fontsize=9)
    skew = "" if routing == "uniform" else f", {routing}"
    axes.set_title(f"{op} {mode}\n{shape}, {dtype}{skew}", fontsize=9, loc="left")


def _points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    found = []
    for row in rows:
        record = row.records.get(name)
        if record is not None and record.p50_ms and not is_wrong(record):
            found.append((row.key[3], operations(row.key) / (1e-3 * record.p50_ms) / TERA))
    return found


def _label_throughput(axes: Axes) -> None:
    """Plain numbers at the powers of ten, and at 2 and 5 times them where these are few."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > WIDE * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())


def _form(name: str) -> dict[str, Any]:
    """A colour and a marker of its own for every provider of every op, the same in each panel."""
    every = {
        provider.name: provider.peer
        for benchmark in BENCHMARKS.values()
        for provider in benchmark.providers
        if provider.name != OURS
    }
    place = [one for one, peer in every.items() if peer == every[name]].index(name)
    if not every[name]:
        colour = LINE_COLOURS[place % len(LINE_COLOURS)]
        return {"color": colour, "marker": "|", "linewidth": 1.2, "linestyle": "-."}
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[(place // len(COLOURS) + place) % len(MARKERS)],
        "linewidth": 1.2,
        "markersize": 4.5,
        "linestyle": "-" if place < len(COLOURS) else ":",
    }
