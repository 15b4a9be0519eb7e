"""What the library promises about speed on a GPU of the Hopper kind, judged on one run's rows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.floors import Row, Verdict, all_within, noise
from benchmarks.shapes import (
    GPU_JUDGED_SHAPE,
    GPU_JUDGED_TOKENS,
    GPU_MANY_TOKENS,
    GPU_SHAPES,
)

__all__ = ["judge_gpu"]

OF_DENSE = {"fwd": 0.60, "fwd_bwd": 0.50}
"""Least part of the throughput of one dense MLP of the same FLOPs."""
OF_GROUPED = 1.5
"""Least speed-up over transformers' grouped_mm, forward and backward, at many tokens."""
OF_BEST = 1.00


def judge_gpu(rows: Sequence[Row]) -> list[Verdict]:
    """Judge the promises for a GPU; none if no row is of a layer of the GPU suite.

    Args:
        rows: Of one run.
    """
    timed = [row for row in rows if row.key[0] == "routed_mlp" and row.key[2] in GPU_SHAPES]
    if not timed:
        return []
    best = {row.label: ratio for row in timed if (ratio := row.of_best) is not None}
    promise = f"routed_mlp on a GPU, every row <= {OF_BEST:.2f} of the best peer"
    verdicts = [_of_dense(timed, mode, least) for mode, least in OF_DENSE.items()]
    return [*verdicts, _of_grouped(timed), all_within(promise, best, OF_BEST, noise(rows))]


def _of_dense(rows: list[Row], mode: str, least: float) -> Verdict:
    case = f"{mode} {GPU_JUDGED_SHAPE} T={GPU_JUDGED_TOKENS} bf16"
    promise = f"routed_mlp, {case}: >= {least:.2f} of the dense MLP of equal FLOPs"
    ratios = {
        row.label: 1 / ratio
        for row in rows
        if row.key[1:5] == (mode, GPU_JUDGED_SHAPE, GPU_JUDGED_TOKENS, "bf16")
        and "dense" in row.records
        and (ratio := row.records["dense"].ours_over_it)
    }
    return _at_least(promise, ratios, least)


def _of_grouped(rows: list[Row]) -> Verdict:
    case = f"fwd_bwd at T >= {GPU_MANY_TOKENS}"
    promise = f"routed_mlp, {case}: >= {OF_GROUPED:.1f}x faster than grouped_mm"
    ratios = {
        row.label: 1 / ratio
        for row in rows
        if row.key[1] == "fwd_bwd"
        and row.key[3] >= GPU_MANY_TOKENS
        and "grouped_mm" in row.records
        and (ratio := row.records["grouped_mm"].ours_over_it)
    }
    return _at_least(promise, ratios, OF_GROUPED)


def _at_least(promise: str, ratios: dict[str, float], least: float) -> Verdict:
    if not ratios:
        return Verdict(promise, None, "no row")
    low = {label: ratio for label, ratio in ratios.items() if ratio < least}
    figure = f"{len(ratios) - len(low)} of {len(ratios)} rows, the worst {min(ratios.values()):.2f}"
    misses = tuple(f"{ratio:.2f}  {label}" for label, ratio in low.items())
    return Verdict(promise, not low, figure, misses)
