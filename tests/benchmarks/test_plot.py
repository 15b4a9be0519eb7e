"""The picture shows each provider's throughput, and nothing that is wrong."""

from pathlib import Path

import pytest

from benchmarks import plot
from benchmarks.cases import OURS
from benchmarks.floors import rows_of
from benchmarks.plot import panels, plot_throughput
from benchmarks.records import Record
from benchmarks.roofline import operations


def timed(provider: str, tokens: int, mode: str = "fwd", **values: object) -> Record:
    known = {"p50_ms": 1.0, "error": 1e-7, **values}
    return Record(
        "routed_mlp",
        provider,
        mode,
        "tiny",
        tokens,
        "fp32",
        "uniform",
        **known,  # pyright: ignore[reportArgumentType]
    )


ROWS = rows_of(
    [
        timed(OURS, 64, p50_ms=2.0),
        timed("eager", 64, error=0.5),
        timed("grouped_mm", 64, p50_ms=None, note="failed: x"),
        timed(OURS, 4),
        timed("eager", 4),
        timed(OURS, 4, "fwd_bwd"),
        timed(OURS, 4, "mem", p50_ms=None),
    ]
)
LIMITS = {row.key: 0.5 for row in ROWS if row.key[1] != "mem"}


def test_rows_that_differ_in_tokens_share_a_panel():
    found = panels(ROWS)
    assert [(key[2], [row.key[3] for row in rows]) for key, rows in found.items()] == [
        ("fwd", [4, 64]),
        ("fwd_bwd", [4]),
    ]


def test_points_are_operations_over_time_and_wrong_ones_are_left_out():
    rows = panels(ROWS)[("routed_mlp", "tiny", "fwd", "fp32", "uniform")]
    few, many = (operations(row.key) / 1e-3 / 1e12 for row in rows)
    assert plot._points(rows, OURS) == [(4, few), (64, pytest.approx(many / 2))]
    assert plot._points(rows, "eager") == [(4, few)]
    assert plot._points(rows, "grouped_mm") == []


def test_a_picture(tmp_path: Path):
    target = tmp_path / "there" / "throughput.svg"
    plot_throughput(ROWS, LIMITS, target, title="a device")
    assert "<svg" in target.read_text()


def test_nothing_to_plot(tmp_path: Path):
    weighed = [row for row in ROWS if row.key[1] == "mem"]
    with pytest.raises(ValueError, match="no row of fwd or fwd_bwd was timed"):
        plot_throughput(weighed, {}, tmp_path / "x.png", title="")
