"""The physical limit of a row: what its products and its memory traffic take at the least.

Both ceilings are measured in the same run: one big product of random numbers, and one big copy.
What a row must compute and move is the `work` of its benchmark.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.floors import Row
from benchmarks.measure import seconds_of
from benchmarks.registry import BENCHMARKS
from benchmarks.shapes import CEILING_SIZES, DTYPES

__all__ = [
    "TIMED",
    "Ceiling",
    "Key",
    "ceilings",
    "least_seconds",
    "limits",
    "measure_ceiling",
    "operations",
]

Key = tuple[str, str, str, int, str, str]
TIMED = ("fwd", "fwd_bwd")
"""The modes whose rows are times."""

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a device does at best.

    Attributes:
        flops: Operations per second of a product; a multiplication and an addition are two.
        bytes: Bytes per second of a copy, read and written ones together.
    """

    flops: float
    bytes: float


def measure_ceiling(dtype: torch.dtype, device: str) -> Ceiling:
    """Measure both ceilings, the best of a few repeats."""
    width, copied = CEILING_SIZES[torch.device(device).type]
    left, right = (torch.randn((width, width), device=device).to(dtype) for _ in range(2))
    source = torch.randn((copied,), device=device)
    target = torch.empty_like(source)
    product = min(seconds_of(lambda: left @ right, device) for _ in range(REPEATS))
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(REPEATS))
    return Ceiling(2 * width**3 / product, 2 * source.nbytes / copy)


def ceilings(dtypes: Iterable[str], device: str) -> dict[str, Ceiling]:
    """Measure the ceilings of each dtype, by its name."""
    return {name: measure_ceiling(DTYPES[name], device) for name in sorted(set(dtypes))}


def least_seconds(row: Row, most: Ceiling) -> float:
    """Time that the products or the traffic of a row need, whichever is longer, pass by pass.

    Args:
        row: In the mode "fwd" or "fwd_bwd".
        most: The ceilings in the dtype of the row.
    """
    op, mode, shape, tokens, dtype, _ = row.key
    size = DTYPES[dtype].itemsize
    return sum(
        max(one.operations / most.flops, size * one.elements / most.bytes)
        for one in BENCHMARKS[op].work(mode, shape, tokens)
    )


def operations(key: Key) -> float:
    """Operations of a row's products, as `Pass` counts them."""
    op, mode, shape, tokens, _, _ = key
    return sum(one.operations for one in BENCHMARKS[op].work(mode, shape, tokens))


def limits(rows: Sequence[Row], most: Mapping[str, Ceiling]) -> dict[Key, float]:
    """The limit of every timed row, in milliseconds, by the row's key.

    Args:
        rows: Of one run.
        most: The ceilings of the device that they ran on, by dtype.
    """
    return {
        row.key: 1e3 * least_seconds(row, most[row.key[4]]) for row in rows if row.key[1] in TIMED
    }
