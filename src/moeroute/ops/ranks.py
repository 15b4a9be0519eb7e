"""What data-parallel ranks do together."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all data-parallel ranks; the tensor itself if there is one rank."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def same_on_all_ranks(values: Tensor) -> Tensor:
    """Rank 0's values on every rank; the tensor itself, which is written to."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(values, src=0)
    return values
