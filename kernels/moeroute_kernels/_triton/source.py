"""Where a kernel reads a weight from: pointers, or the tensor memory accelerator (TMA) of Hopper.

A descriptor has one box per expert, half (gate and up, where they lie one after the other), rows
and columns, so that a tile never leaves its expert or half: what lies beyond is read as zero.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moeroute_kernels._triton.config import ROW_TILES, WHOLE_STEP, Tiles

POINTERS, ROWS, COLUMNS = 0, 1, 2
"""By pointers; by TMA from rows along the summed axis, or from rows along the columns."""
ALIGNMENT = 16
HALF_BYTES = 2
HOPPER = 90


def weight_source(weight: Tensor, tiles: Tiles, halves: int = 1) -> tuple[Any, int]:
    """Choose how a kernel reads a weight.

    Args:
        weight: (E, O, I), any strides; the sum is over I.
        tiles: The kernel's tiles.
        halves: 2 if the columns of a tile come from both halves of O, else 1.

    Returns:
        What to pass to the kernel as the weight, and POINTERS, ROWS or COLUMNS.
    """
    experts, outs, ins = weight.shape
    per_expert, per_out, per_in = weight.stride()
    height = outs // halves
    if not weight.numel() or weight.element_size() != HALF_BYTES or not _has_tma():
        return weight, POINTERS
    if per_in == 1:
        shape = [experts, halves, height, ins]
        strides = [per_expert, height * per_out, per_out, 1]
        box, source = [1, halves, tiles.columns // halves, tiles.inner], ROWS
    elif per_out == 1:
        shape = [experts, ins, halves, height]
        strides = [per_expert, per_in, height if halves > 1 else per_in, 1]
        box, source = [1, tiles.inner, halves, tiles.columns // halves], COLUMNS
    else:
        return weight, POINTERS
    numbers = [weight.data_ptr(), *(stride * HALF_BYTES for stride in strides[:-1])]
    if min(strides) <= 0 or any(number % ALIGNMENT for number in numbers):
        return weight, POINTERS
    return TensorDescriptor(weight, shape, strides, box), source


def comes_whole(weight: Tensor) -> bool:
    """Tell whether a weight comes by TMA and in whole steps: no pointers and no masks to hold.

    Args:
        weight: (E, O, I), any strides; the sum is over I.
    """
    whole = weight.shape[2] % WHOLE_STEP == 0
    return whole and weight_source(weight, ROW_TILES["many", HALF_BYTES])[1] != POINTERS


def _has_tma() -> bool:
    if triton.knobs.runtime.interpret:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= HOPPER
