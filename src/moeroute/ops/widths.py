"""Routes through feed-forward blocks that have a small twin: which of them a token takes.

Axes: R routes, L routed blocks.
"""

from __future__ import annotations

import itertools
import math
from enum import IntEnum

import torch
from torch import Tensor


class Width(IntEnum):
    """What a token takes at a block; as an expert id, and as a logit's place."""

    SMALL = 0
    BIG = 1
    BYPASS = 2


def count_routes(layers: int, *, num_big: int | None = None, bypass: bool = False) -> int:
    """How many routes `all_routes` gives, without making them.

    2^L of all widths, 3^L with bypass; with exactly k big blocks C(L, k), with bypass
    C(L, k) 2^(L-k).

    Raises:
        ValueError: See `all_routes`.
    """
    _check(layers, num_big)
    others = 2 if bypass else 1
    if num_big is None:
        return (others + 1) ** layers
    return math.comb(layers, num_big) * others ** (layers - num_big)


def all_routes(layers: int, *, num_big: int | None = None, bypass: bool = False) -> Tensor:
    """Every route, the cheapest first: fewest big blocks, then fewest small ones.

    Args:
        layers: L, at least 1.
        num_big: How many blocks are big in every route; None takes any number.
        bypass: Whether a block may be bypassed.

    Returns:
        (R, L) int64 of `Width`.

    Raises:
        ValueError: There is no block, or num_big is outside [0, L].
    """
    _check(layers, num_big)
    widths = (Width.BYPASS, Width.SMALL, Width.BIG) if bypass else (Width.SMALL, Width.BIG)
    others = widths[:-1]
    counts = range(layers + 1) if num_big is None else (num_big,)
    routes: list[tuple[int, ...]] = []
    for count in counts:
        some = []
        for places in itertools.combinations(range(layers), count):
            for rest in itertools.product(others, repeat=layers - count):
                left = iter(rest)
                some.append(
                    tuple(Width.BIG if layer in places else next(left) for layer in range(layers))
                )
        routes += sorted(some, key=lambda route: route.count(Width.SMALL))
    return torch.tensor(routes, dtype=torch.int64)


def _check(layers: int, num_big: int | None) -> None:
    if layers < 1:
        raise ValueError(f"layers={layers}; a route needs at least one block")
    if num_big is not None and not 0 <= num_big <= layers:
        raise ValueError(
            f"num_big={num_big} is outside [0, {layers}]: there are {layers} routed blocks"
        )
