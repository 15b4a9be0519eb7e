"""What the library promises about speed on a GPU of the Hopper kind, judged on one run's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.cases import OURS
from benchmarks.floors import MAX_ERROR, Row, Verdict, all_within, noise
from benchmarks.roofline import Ceiling
from benchmarks.shapes import (
    DTYPES,
    GPU_FEW_TOKENS,
    GPU_JUDGED_SHAPE,
    GPU_JUDGED_TOKENS,
    GPU_MANY_TOKENS,
    GPU_NEAR_SHAPES,
    GPU_SHAPES,
    expert_shape,
)

__all__ = ["judge_gpu"]

OF_GEMM = {"fwd": 0.60, "fwd_bwd": 0.50}
"""Least part of the throughput of one product of the same operations."""
NEAR = 0.9
"""Part of that which the layers near the judged one are to reach."""
OF_COPY = 0.85
"""Least part of the copy bandwidth on the weights that few tokens must read."""
SPEEDUPS = {"grouped_mm": 1.5, "scattermoe": 1.5, "liger": 1.3}
"""Least speed-ups forward and backward, at many tokens."""
OF_BEST = 1.00
OF_PEAK = 0.6
"""Most of the peak memory of transformers' grouped_mm, forward and backward."""
LAUNCHES = 4
"""Most launches of one token's forward, without a graph."""


def judge_gpu(rows: Sequence[Row], most: Mapping[str, Ceiling]) -> list[Verdict]:
    """Judge the promises for a GPU; none if no row is of a layer of the GPU suite.

    Args:
        rows: Of one run.
        most: What the device does at best, by dtype.
    """
    ours = [row for row in rows if row.key[0] == "routed_mlp" and row.key[2] in GPU_SHAPES]
    if not ours:
        return []
    best = {row.label: ratio for row in ours if (ratio := row.of_best) is not None}
    promise = f"routed_mlp on a GPU, every row <= {OF_BEST:.2f} of the best peer"
    return [
        *(_of_gemm(ours, mode, least) for mode, least in OF_GEMM.items()),
        *(_near(ours, mode, least) for mode, least in OF_GEMM.items()),
        _of_copy(ours, most),
        *(_speedup(ours, peer, least) for peer, least in SPEEDUPS.items()),
        all_within(promise, best, OF_BEST, noise(ours)),
        _peak(ours),
        _counted(ours, "launches", "launches of the forward at T=1", LAUNCHES),
        _counted(ours, "compiles", "kernels compiled anew over 20 other T", 0),
        _captured(ours),
    ]


def _of_gemm(rows: Sequence[Row], mode: str, least: float) -> Verdict:
    case = f"{mode} {GPU_JUDGED_SHAPE} T={GPU_JUDGED_TOKENS} bf16"
    promise = f"routed_mlp, {case}: >= {least:.2f} of one product of equal FLOPs"
    return _at_least(promise, _fractions(rows, mode, (GPU_JUDGED_SHAPE,)), least)


def _near(rows: Sequence[Row], mode: str, least: float) -> Verdict:
    names = " and ".join(GPU_NEAR_SHAPES)
    promise = f"routed_mlp, {mode} {names}: >= {NEAR * least:.2f} of one product of equal FLOPs"
    return _at_least(promise, _fractions(rows, mode, GPU_NEAR_SHAPES), NEAR * least)


def _fractions(rows: Sequence[Row], mode: str, shapes: Sequence[str]) -> dict[str, float]:
    return {
        row.label: 1 / ratio
        for row in rows
        if row.key[1] == mode
        and row.key[2] in shapes
        and row.key[3:] == (GPU_JUDGED_TOKENS, "bf16", "uniform")
        and (ratio := row.over("gemm"))
    }


def _of_copy(rows: Sequence[Row], most: Mapping[str, Ceiling]) -> Verdict:
    """The weights of the experts that are expected to be hit, read once, in our time."""
    promise = (
        f"routed_mlp, fwd at T <= {GPU_FEW_TOKENS}: >= {OF_COPY:.2f} of the copy bandwidth on the "
        "weights to be read"
    )
    found = {}
    for row in rows:
        _, mode, name, tokens, dtype, routing = row.key
        taken = row.records[OURS].p50_ms
        if (mode, routing) != ("fwd", "uniform") or tokens > GPU_FEW_TOKENS or not taken:
            continue
        shape = expert_shape(name)
        weights = 3 * shape.hidden_size * shape.intermediate_size * DTYPES[dtype].itemsize
        moved = shape.experts_hit(tokens) * weights
        found[row.label] = moved / (1e-3 * taken) / most[dtype].bytes
    return _at_least(promise, found, OF_COPY)


def _speedup(rows: Sequence[Row], peer: str, least: float) -> Verdict:
    promise = f"routed_mlp, fwd_bwd at T >= {GPU_MANY_TOKENS}: >= {least:.1f}x faster than {peer}"
    ratios = {
        row.label: 1 / ratio
        for row in rows
        if row.key[1] == "fwd_bwd" and row.key[3] >= GPU_MANY_TOKENS and (ratio := row.over(peer))
    }
    return _at_least(promise, ratios, least)


def _peak(rows: Sequence[Row]) -> Verdict:
    promise = f"routed_mlp, peak memory of fwd_bwd <= {OF_PEAK:.2f} of grouped_mm's"
    ratios = {
        row.label: ours / theirs
        for row in rows
        if row.key[1] == "mem"
        and "grouped_mm" in row.records
        and (ours := row.records[OURS].peak_bytes) is not None
        and (theirs := row.records["grouped_mm"].peak_bytes)
    }
    return _at_most(promise, ratios, OF_PEAK)


def _counted(rows: Sequence[Row], mode: str, what: str, limit: int) -> Verdict:
    counts = {
        row.label: float(count)
        for row in rows
        if row.key[1] == mode and (count := row.records[OURS].count) is not None
    }
    return _at_most(f"routed_mlp, {what} <= {limit}", counts, limit)


def _captured(rows: Sequence[Row]) -> Verdict:
    """A capture that raised has no error to show; it misses all the same."""
    promise = "routed_mlp, a CUDA graph of the forward replays with other inputs to the same answer"
    asked = [(row.label, row.records[OURS]) for row in rows if row.key[1] == "graph"]
    if not asked:
        return Verdict(promise, None, "no row")
    misses = tuple(
        f"{record.note or record.error}  {label}"
        for label, record in asked
        if record.error is None or not record.error <= MAX_ERROR[record.dtype]
    )
    return Verdict(promise, not misses, f"{len(asked) - len(misses)} of {len(asked)} rows", misses)


def _at_least(promise: str, ratios: dict[str, float], least: float) -> Verdict:
    return _judged(promise, ratios, lambda ratio: ratio < least, min)


def _at_most(promise: str, values: dict[str, float], limit: float) -> Verdict:
    return _judged(promise, values, lambda value: value > limit, max)


def _judged(
    promise: str,
    values: dict[str, float],
    breaks: Callable[[float], bool],
    worst: Callable[..., float],
) -> Verdict:
    if not values:
        return Verdict(promise, None, "no row")
    over = {label: value for label, value in values.items() if breaks(value)}
    kept, all_of = len(values) - len(over), len(values)
    figure = f"{kept} of {all_of} rows, the worst {worst(values.values()):.2f}"
    misses = tuple(f"{value:.2f}  {label}" for label, value in over.items())
    return Verdict(promise, not over, figure, misses)
