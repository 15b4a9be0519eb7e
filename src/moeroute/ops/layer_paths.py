"""Paths through the layers of a model, and how often each layer stands in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def actions_of_path(path: Sequence[int], layers: int) -> tuple[int, ...]:
    """How often each layer stands in a path.

    Args:
        path: Layer indices in the order of their execution; a repeated layer follows itself.
        layers: L.

    Raises:
        ValueError: The path goes back, or names a layer that is not there.
    """
    if list(path) != sorted(path):
        raise ValueError(
            f"the path {list(path)} goes back; layers are skipped or repeated in place"
        )
    if path and not 0 <= path[0] <= path[-1] < layers:
        raise ValueError(f"the path {list(path)} leaves the layers 0 to {layers - 1}")
    return tuple(list(path).count(layer) for layer in range(layers))


def path_of_actions(actions: Sequence[int]) -> tuple[int, ...]:
    """The layers in the order of their execution: the inverse of `actions_of_path`."""
    return tuple(layer for layer, times in enumerate(actions) for _ in range(times))


def count_actions(labels: Tensor, actions: int) -> tuple[int, ...]:
    """How often each action stands in (N, L) labels.

    Args:
        labels: Integers in [0, A).
        actions: A.
    """
    return tuple(torch.bincount(labels.reshape(-1), minlength=actions).tolist())
