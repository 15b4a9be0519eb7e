"""Sums over data-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all data-parallel ranks; the tensor itself if there is one rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values
