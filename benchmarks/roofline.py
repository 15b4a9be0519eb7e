"""The physical limit of a routed MLP: what its products and its memory traffic take at the least.

Both ceilings are measured in the same run: one big product of random numbers, and one big copy.

Axes: T tokens, K slots, S = T * K rows, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.floors import Row
from benchmarks.measure import seconds_of
from benchmarks.shapes import CEILING_SIZES, DTYPES, expert_shape

__all__ = ["Ceiling", "ceiling", "least_seconds", "limits"]

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


def ceiling(dtype: torch.dtype, device: str) -> Ceiling:
    """Measure both ceilings, the best of a few repeats."""
    width, copied = CEILING_SIZES[torch.device(device).type]
    left, right = (torch.randn((width, width), device=device).to(dtype) for _ in range(2))
    source = torch.randn((copied,), device=device)
    target = torch.empty_like(source)
    product = min(seconds_of(lambda: left @ right, device) for _ in range(REPEATS))
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(REPEATS))
    return Ceiling(2 * width**3 / product, 2 * source.nbytes / copy)


def least_seconds(row: Row, most: Ceiling) -> float:
    """Time that the products or the traffic of a row need, whichever is longer, pass by pass.

    A pass reads every expert that is expected to be hit once; what one kernel writes and the next
    reads is counted twice.

    Args:
        row: Of `routed_mlp`, in the mode "fwd" or "fwd_bwd".
        most: The ceilings in the dtype of the row.
    """
    _, mode, name, tokens, dtype, _ = row.key
    shape = expert_shape(name)
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    rows = tokens * shape.top_k
    hit = experts * (1 - (1 - shape.top_k / experts) ** tokens)
    ends, matrix = 2 * tokens * hidden, hidden * inner
    training = mode == "fwd_bwd"
    forward = ends + 3 * hit * matrix + (4 if training else 2) * rows * inner + 2 * rows * hidden
    passes = [(6 * rows * matrix, forward)]
    if training:
        inner_gradient = tokens * hidden + hit * matrix + 5 * rows * inner
        down = tokens * hidden + rows * inner + experts * matrix
        x = 2 * rows * inner + 2 * hit * matrix + 2 * rows * hidden + tokens * hidden
        gate_up = tokens * hidden + 2 * rows * inner + 2 * experts * matrix
        passes.append((12 * rows * matrix, inner_gradient + down + x + gate_up))
    size = DTYPES[dtype].itemsize
    return sum(max(flop / most.flops, size * moved / most.bytes) for flop, moved in passes)


def limits(rows: Sequence[Row], device: str) -> dict[tuple[str, str, str, int, str, str], float]:
    """The limit of every timed row of `routed_mlp`, in milliseconds, by the row's key.

    Args:
        rows: Of one run.
        device: That they ran on.
    """
    timed = [row for row in rows if row.key[0] == "routed_mlp" and row.key[1] != "mem"]
    names = {row.key[4] for row in timed}
    ceilings = {name: ceiling(DTYPES[name], device) for name in sorted(names)}
    return {row.key: 1e3 * least_seconds(row, ceilings[row.key[4]]) for row in timed}
