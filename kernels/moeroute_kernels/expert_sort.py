"""Expert ids -> the order of the routed rows, its inverse and each expert's end; no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from moeroute_kernels.reference import SortedSlots


def sort_slots(ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort slots in plain torch; see `expert_sort`."""
    # what lies outside becomes -1 or num_groups, and -1 modulo num_groups + 1 is num_groups
    flat = ids.reshape(-1).long().clamp(-1, num_groups).remainder_(num_groups + 1)
    sorted_ids, order = torch.sort(flat, stable=True)
    groups = torch.arange(num_groups, device=ids.device, dtype=sorted_ids.dtype)
    expert_offsets = torch.searchsorted(sorted_ids, groups, right=True, out_int32=True)
    return order, invert(order), expert_offsets


def invert(order: Tensor) -> Tensor:
    """Invert a permutation (N,) int64."""
    positions = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, positions)


@torch.library.custom_op(
    "moeroute::expert_sort",
    mutates_args=(),
    schema="(Tensor ids, int num_groups) -> (Tensor, Tensor, Tensor)",
)
def expert_sort_op(ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The default kernel: any device, plain torch."""
    return sort_slots(ids, num_groups)


@expert_sort_op.register_fake
def _(ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    order = ids.new_empty((ids.numel(),), dtype=torch.int64)
    return order, torch.empty_like(order), ids.new_empty((num_groups,), dtype=torch.int32)


def expert_sort(ids: Tensor, num_groups: int) -> SortedSlots:
    """Sort slots by expert: stable, empty slots last, no host sync, no gradient.

    Args:
        ids: (T, K) integers, any strides; anything outside [0, num_groups) is an empty slot.
        num_groups: E, at least 1.

    Returns:
        order (N,) int64, inverse (N,) int64 and expert_offsets (E,) int32, with N = T * K; see
        `moeroute_kernels.reference.SortedSlots`.

    Raises:
        ValueError: ids is not a matrix of integers, or num_groups is below 1.
    """
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"expert_sort: ids is {tuple(ids.shape)} {ids.dtype}; give a (T, K) integer tensor"
        )
    if num_groups < 1:
        raise ValueError(f"expert_sort: num_groups={num_groups}; there must be at least 1 expert")
    return SortedSlots(*expert_sort_op(ids, num_groups))
