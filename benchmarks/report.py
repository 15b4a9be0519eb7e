"""The rows of a run as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean

from rich.console import Console
from rich.table import Table

from benchmarks.cases import AGAIN, OURS
from benchmarks.floors import Row, Verdict, is_wrong, noise, rows_of
from benchmarks.records import Record, Stamp
from benchmarks.registry import BENCHMARKS

__all__ = ["print_report"]

MEBIBYTE = 2**20
PLACES = 3
"""Rows that are named with what happened there; more are counted."""
Limits = Mapping[tuple[str, str, str, int, str, str], float]


def _peer_cell(record: Record | None, ours: Record) -> str:
    if record is None:
        return ""
    if record.p50_ms is None:
        return "[red]failed[/]" if record.failed else "[dim]skipped[/]"
    fewer = f" N={record.rounds}" if record.rounds < ours.rounds else ""
    flag = " [red]wrong[/]" if is_wrong(record) else ""
    ratio = "-" if record.ours_over_it is None else f"{record.ours_over_it:.2f}"
    return f"{ratio} [dim]{_ms(record.p50_ms)}{fewer}[/]{flag}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _of_best_cell(row: Row) -> str:
    ratio, best = row.of_best, row.best_peer
    if ratio is None or best is None:
        return "-"
    colour = "green" if ratio <= 1 else "yellow" if ratio <= 1.1 else "red"
    return f"[bold {colour}]{ratio:.2f}[/] [dim]{best.provider}[/]"


def _ours_cell(record: Record) -> str:
    if record.p50_ms is None:
        return "[red]failed[/]"
    low, middle, high = (_ms(value) for value in (record.p20_ms, record.p50_ms, record.p80_ms))
    return f"{middle} [dim]\\[{low}, {high}][/]"


def _speed_table(op: str, mode: str, rows: Sequence[Row], limits: Limits) -> Table:
    names = [
        provider.name
        for provider in BENCHMARKS[op].providers[1:]
        if any(_was_called(row.records.get(provider.name)) for row in rows)
    ]
    clock = rows[0].records[OURS].clock
    table = Table(
        title=f"{op}, {mode}: our time / theirs (below 1: we lead), their median {clock} ms"
    )
    columns = [
        "shape",
        "T",
        "dtype",
        "ours ms \\[p20, p80]",
        "N",
        "error",
        "A/A",
        "limit",
        "/ best",
        *names,
    ]
    for column in columns:
        left = column in ("shape", "dtype", "/ best", *names)
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        _, _, shape, tokens, dtype, routing = row.key
        ours, again = row.records[OURS], row.records.get(AGAIN)
        same = "-" if again is None or again.ours_over_it is None else f"{again.ours_over_it:.2f}"
        table.add_row(
            shape if routing == "uniform" else f"{shape} {routing}",
            str(tokens),
            dtype,
            _ours_cell(ours),
            str(ours.rounds),
            "-" if ours.error is None else f"{ours.error:.0e}",
            same,
            f"{limits[row.key] / ours.p50_ms:.0%}" if row.key in limits and ours.p50_ms else "-",
            _of_best_cell(row),
            *(_peer_cell(row.records.get(name), ours) for name in names),
        )
    ratios = [ratio for row in rows if (ratio := row.of_best) is not None]
    if ratios:
        table.caption = f"geometric mean of / best: {geometric_mean(ratios):.3f}"
    return table


def _was_called(record: Record | None) -> bool:
    return record is not None and (record.failed or not record.note)


def _bytes_cell(record: Record) -> str:
    if record.saved_bytes is None or record.peak_bytes is None:
        return "skipped"
    return f"{record.saved_bytes / MEBIBYTE:.1f} | {record.peak_bytes / MEBIBYTE:.1f}"


def _graph_cell(record: Record) -> str:
    return f"error {record.error:.0e}, {_ms(record.p50_ms)} ms a replay"


CELLS: Mapping[str, tuple[str, Callable[[Record], str]]] = {
    "mem": ("MiB saved for backward | MiB at the peak of fwd_bwd", _bytes_cell),
    "launches": ("kernels, copies and fills of one forward", lambda one: str(one.count)),
    "compiles": ("kernels compiled anew over 20 other T, fwd and bwd", lambda one: str(one.count)),
    "graph": ("a forward captured and replayed on other inputs", _graph_cell),
}
"""What the table of a mode that is no time shows, and how a record says it."""


def _count_table(op: str, mode: str, rows: Sequence[Row]) -> Table:
    heading, cell = CELLS[mode]
    table = Table(title=f"{op}, {mode}: {heading}")
    called = {name for row in rows for name, one in row.records.items() if _was_called(one)}
    names = [one.name for one in BENCHMARKS[op].providers if one.name in called]
    for column in ("shape", "T", "dtype", *names):
        table.add_column(column, no_wrap=True)
    for row in rows:
        cells = []
        for name in names:
            record = row.records.get(name)
            if record is None or record.note:
                cells.append(
                    "[red]failed[/]" if record is not None and record.failed else "skipped"
                )
            else:
                cells.append(cell(record))
        table.add_row(row.key[2], str(row.key[3]), row.key[4], *cells)
    return table


def print_report(
    console: Console,
    records: Sequence[Record],
    made: Stamp,
    verdicts: Sequence[Verdict],
    limits: Limits,
) -> None:
    """Print tables, geometric means, what was skipped and why, and the verdicts.

    Args:
        console: Where.
        records: Of one run.
        made: The run.
        verdicts: Of the promises.
        limits: Milliseconds that a row needs at the least, by its key; see `roofline`.
    """
    rows = rows_of(records)
    console.print(
        f"{made.device}, {made.threads} threads, torch {made.torch}, "
        f"transformers {made.transformers}, commit {made.commit}{' + changes' * made.dirty}"
    )
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault(row.key[:2], []).append(row)
    for (op, mode), together in tables.items():
        if mode in CELLS:
            console.print(_count_table(op, mode, together))
        else:
            console.print(_speed_table(op, mode, together, limits))
    for reason, places in _notes(records).items():
        console.print(f"[dim]{reason} ({places})[/]", highlight=False)
    console.print(f"A/A noise of this run: 90 % of the rows within 1 +- {noise(rows):.3f}")
    for verdict in verdicts:
        colour = {True: "green", False: "red", None: "dim"}[verdict.kept]
        console.print(f"[{colour}]{verdict.line}[/]", highlight=False)
        for miss in verdict.misses:
            console.print(f"        {miss}", highlight=False)


def _notes(records: Sequence[Record]) -> dict[str, str]:
    """Why a provider was left out or failed, and where; every reason once."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        if record.note:
            word = "" if record.failed else "skipped: "
            places = found.setdefault(f"{record.provider}, {word}{record.note}", {})
            places[f"{record.mode} {record.shape_name} T={record.tokens}"] = None
    return {
        reason: "; ".join(places) if len(places) <= PLACES else f"{len(places)} rows"
        for reason, places in found.items()
    }
