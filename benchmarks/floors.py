"""What the library promises about speed and memory, judged on the rows of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.cases import AGAIN, OURS
from benchmarks.records import Record
from benchmarks.registry import BENCHMARKS
from benchmarks.shapes import (
    FLOOR_SHAPES,
    LORA_FLOOR_CASES,
    MANY_EXPERTS,
    MEMORY_SHAPE,
    expert_shape,
)

__all__ = ["MAX_ERROR", "Row", "Verdict", "all_above", "all_within", "judge", "noise", "rows_of"]

MAX_ERROR = {"fp32": 1e-5, "bf16": 2e-2}
MEAN_OF_BEST = 1.00
WORST_OF_BEST = 1.10
EAGER_SPEEDUP = 3.0
SAVED_OF_GROUPED = 0.30
LORA_OF_BEST = 1.00


@dataclass(frozen=True)
class Row:
    """All providers of one case.

    Attributes:
        key: op, mode, shape_name, tokens, dtype, routing.
        records: By provider.
    """

    key: tuple[str, str, str, int, str, str]
    records: dict[str, Record]

    @property
    def label(self) -> str:
        """The key as one reads it."""
        op, mode, shape, tokens, dtype, routing = self.key
        return f"{op} {mode} {shape} T={tokens} {dtype} {routing}"

    def over(self, provider: str) -> float | None:
        """Our time as a fraction of a provider's; None where either has none or ours is wrong."""
        record = self.records.get(provider)
        if record is None or OURS not in self.records or is_wrong(self.records[OURS]):
            return None
        return record.ours_over_it

    @property
    def best_peer(self) -> Record | None:
        """The fastest peer whose answer is right, or None."""
        names = {p.name for p in BENCHMARKS[self.key[0]].providers if p.peer}
        timed = [
            r
            for r in self.records.values()
            if r.provider in names and r.p50_ms is not None and not is_wrong(r)
        ]
        return min(timed, key=lambda r: r.p50_ms or math.inf, default=None)

    @property
    def of_best(self) -> float | None:
        """Our time as a fraction of the best peer's; infinite where our answer is wrong."""
        best = self.best_peer
        if best is None:
            return None
        return math.inf if is_wrong(self.records[OURS]) else best.ours_over_it


@dataclass(frozen=True)
class Verdict:
    """One promise, judged.

    Attributes:
        promise: What was promised.
        kept: Whether it holds in this run; None where no row tells.
        figure: What was seen.
        misses: The rows that break it.
    """

    promise: str
    kept: bool | None
    figure: str
    misses: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The verdict in one line."""
        word = {True: "PASS", False: "MISS", None: "----"}[self.kept]
        return f"{word}  {self.promise}: {self.figure}"


def is_wrong(record: Record) -> bool:
    """Whether there is no answer, or one further from the definition than its dtype explains."""
    if record.failed:
        return True
    return record.error is not None and not record.error <= MAX_ERROR[record.dtype]


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Group records by case, in the order of the run."""
    found: dict[tuple[str, str, str, int, str, str], dict[str, Record]] = {}
    for record in records:
        found.setdefault(record.row, {})[record.provider] = record
    return [Row(key, group) for key, group in found.items()]


def noise(rows: Sequence[Row]) -> float:
    """How far the same code is from itself: 90 % of the A/A ratios lie within 1 +- this."""
    again = [row.records[AGAIN].ours_over_it for row in rows if AGAIN in row.records]
    spreads = sorted(abs(ratio - 1) for ratio in again if ratio is not None)
    return spreads[int(0.9 * (len(spreads) - 1))] if spreads else 0.0


def _ratios(rows: Iterable[Row]) -> dict[str, float]:
    return {row.label: ratio for row in rows if (ratio := row.of_best) is not None}


def all_within(promise: str, ratios: dict[str, float], limit: float, spread: float) -> Verdict:
    """Judge that no ratio is above a limit.

    Args:
        promise: What was promised.
        ratios: By the label of a row.
        limit: The largest that keeps it.
        spread: The noise of the run.
    """
    if not ratios:
        return Verdict(promise, None, "no row")
    over = {label: ratio for label, ratio in ratios.items() if ratio > limit}
    beyond = sum(ratio > limit + spread for ratio in over.values())
    worst = max(ratios.values())
    figure = f"{len(ratios) - len(over)} of {len(ratios)} rows, the worst {worst:.2f}"
    if over:
        figure += f"; {beyond} of the {len(over)} misses are beyond the noise"
    misses = tuple(f"{ratio:.3f}  {label}" for label, ratio in over.items())
    return Verdict(promise, not over, figure, misses)


def _mean_of_best(rows: list[Row]) -> Verdict:
    promise = f"routed_mlp, geometric mean <= {MEAN_OF_BEST:.2f} of the best of transformers' three"
    ratios = _ratios(rows)
    if not ratios:
        return Verdict(promise, None, "no row")
    mean = geometric_mean(ratios.values())
    return Verdict(promise, mean <= MEAN_OF_BEST, f"{mean:.3f} over {len(ratios)} rows")


def _eager_speedup(rows: list[Row]) -> Verdict:
    promise = (
        f"routed_mlp, >= {EAGER_SPEEDUP:.0f}x faster than eager in fwd_bwd at E={MANY_EXPERTS}"
    )
    speedups = {
        row.label: 1 / ratio
        for row in rows
        if row.key[1] == "fwd_bwd"
        and expert_shape(row.key[2]).num_experts == MANY_EXPERTS
        and "eager" in row.records
        and (ratio := row.records["eager"].ours_over_it)
    }
    return all_above(promise, speedups, EAGER_SPEEDUP)


def all_above(promise: str, speedups: dict[str, float], least: float) -> Verdict:
    """Judge that no speed-up is below the least.

    Args:
        promise: What was promised.
        speedups: By the label of a row.
        least: The smallest that keeps it.
    """
    if not speedups:
        return Verdict(promise, None, "no row")
    low = {label: value for label, value in speedups.items() if value < least}
    figure = (
        f"{len(speedups) - len(low)} of {len(speedups)} rows, "
        f"from {min(speedups.values()):.1f}x to {max(speedups.values()):.1f}x"
    )
    misses = tuple(f"{value:.2f}x  {label}" for label, value in low.items())
    return Verdict(promise, not low, figure, misses)


def _saved(rows: list[Row]) -> Verdict:
    promise = f"routed_mlp, bytes saved for backward <= {SAVED_OF_GROUPED:.2f} of grouped_mm's"
    ratios = {
        row.label: ours / theirs
        for row in rows
        if row.key[1] == "mem"
        and "grouped_mm" in row.records
        and (ours := row.records[OURS].saved_bytes) is not None
        and (theirs := row.records["grouped_mm"].saved_bytes)
    }
    if not ratios:
        return Verdict(promise, None, "no row")
    over = {label: ratio for label, ratio in ratios.items() if ratio > SAVED_OF_GROUPED}
    figure = ", ".join(f"{ratio:.3f} ({label.split()[-2]})" for label, ratio in ratios.items())
    misses = tuple(f"{ratio:.3f}  {label}" for label, ratio in over.items())
    return Verdict(promise, not over, figure, misses)


def _picked(rows: Sequence[Row], keep: Callable[[Row], bool]) -> list[Row]:
    return [row for row in rows if keep(row)]


def judge(records: Sequence[Record]) -> list[Verdict]:
    """Judge every promise on the rows that were run.

    Args:
        records: Of one run.

    Returns:
        One verdict per promise.
    """
    rows = rows_of(records)
    spread = noise(rows)
    timed = _picked(rows, lambda row: row.key[0] == "routed_mlp" and row.key[2] in FLOOR_SHAPES)
    memory = _picked(rows, lambda row: row.key[:3] == ("routed_mlp", "mem", MEMORY_SHAPE))
    lora = _picked(
        rows,
        lambda row: (
            row.key[:2] == ("gated_lora", "fwd_bwd")
            and row.key[4] == "fp32"
            and row.key[2:4] in LORA_FLOOR_CASES
        ),
    )
    worst = f"routed_mlp, every row <= {WORST_OF_BEST:.2f} of the best of transformers' three"
    mixture = f"gated_lora, fwd_bwd fp32, every row <= {LORA_OF_BEST:.2f} of the best of four forms"
    wrong = tuple(
        f"{record.note or f'{record.error:.1e}'}  {row.label}"
        for row in rows
        if (record := row.records.get(OURS)) is not None and is_wrong(record)
    )
    right = f"{len(rows) - len(wrong)} of {len(rows)} rows"
    return [
        Verdict(
            "answers and gradients agree with the definition",
            not wrong if rows else None,
            right,
            wrong,
        ),
        _mean_of_best(timed),
        all_within(worst, _ratios(timed), WORST_OF_BEST, spread),
        _eager_speedup(timed),
        _saved(memory),
        all_within(mixture, _ratios(lora), LORA_OF_BEST, spread),
    ]
