"""Grouped products as loops over the experts that have rows: the path of every device without one.

The loop lives inside an op, so a graph never sees it and autograd never indexes a weight (under
autograd each `weight[e]` costs a zero-filled gradient of the whole stack). It has no alignment
rule, takes float64 and any strides, and costs one call per expert that was hit. In torch 2.13
`F.grouped_mm` is the same loop on a CPU, in one form of product; here the form follows the rows.

Axes: N rows, E experts, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeroute_kernels import cpu_memory

# The switches below were measured on a Sapphire Rapids with AMX, torch 2.13, at 1 and 2 threads,
# with matrices from 1024 x 256 to 4096 x 1024. "Flipped" computes (weight @ rows.T).T and copies:
# oneDNN then reads a bfloat16 weight without repacking it, and MKL has better float32 kernels for
# few columns. It saves work in proportion to I and copies in proportion to the rows.
FLIP_ROWS_BFLOAT16 = (2, 128)
"""Fewest and most rows of one expert for which a bfloat16 product is flipped."""
FLIP_COLUMNS_PER_ROW = 10
"""A bfloat16 product is flipped while I is at least this many times the rows."""
FLIP_ROWS_FLOAT32 = (16, 48)
"""Fewest and most rows of one expert for which a float32 product is flipped."""
FLIP_COLUMNS_FLOAT32 = 1024
"""Smallest I for which a float32 product is flipped."""
FLIP_ROWS_BIG_FLOAT32 = 9
"""Fewest rows where a float32 matrix has FLIP_BIG_FLOAT32 elements and more."""
FLIP_BIG_FLOAT32 = 2**21
"""Elements of one expert's float32 matrix from which on it counts as big."""
UNBIND_FRACTION = 0.25
"""From this fraction of hit experts on, taking all of a stack's matrices at once is cheaper."""
GROUPED_MM_ROWS = 32
"""Most rows per hit expert for which torch's own loop is taken where no product is flipped: it
saves 3 microseconds an expert, but cannot write into a given buffer."""
GROUPED_MM_ALIGNMENT = 16
"""Bytes that every stride and address given to torch's own loop must be a multiple of."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The experts that have rows, in row order.

    Attributes:
        experts: Their ids.
        sizes: The rows of each.
        filled: The sum of sizes; rows from here on belong to empty slots.
        ends: (E,) the inclusive ends that the others were read off; None if the experts of the runs
            do not ascend.
    """

    experts: list[int]
    sizes: list[int]
    filled: int
    ends: Tensor | None

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Views of each expert's rows."""
        if not self.sizes:
            return ()
        if rows.shape[0] != self.filled:
            rows = rows[: self.filled]
        return torch.split_with_sizes(rows, self.sizes)

    def matrices(self, weight: Tensor) -> Sequence[Tensor]:
        """Views of each hit expert's matrix in an (E, ...) stack."""
        if len(self.experts) > UNBIND_FRACTION * weight.shape[0]:
            stack = weight.unbind(0)
            if len(self.experts) == len(stack):
                return stack
            return [stack[expert] for expert in self.experts]
        return [weight[expert] for expert in self.experts]


def expert_runs(expert_offsets: Tensor) -> Runs:
    """Read the experts that have rows off the (E,) inclusive ends."""
    experts, sizes, start = [], [], 0
    for expert, end in enumerate(expert_offsets.tolist()):
        if end > start:
            experts.append(expert)
            sizes.append(end - start)
            start = end
    return Runs(experts, sizes, start, expert_offsets)


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype that products are made in: float16 has no fast product on a CPU."""
    if like.dtype == torch.float16 and like.device.type == "cpu":
        return torch.float32
    return like.dtype


def mm_rows(rows: Tensor, weight: Tensor, runs: Runs, buffer: Tensor | None = None) -> Tensor:
    """Compute rows @ weight[expert].T, expert by expert.

    Args:
        rows: (n, I) contiguous, n >= runs.filled; rows in no run are not read.
        weight: (E, O, I), any strides; cast expert by expert where its dtype is not that of rows.
        runs: The rows of each expert.
        buffer: (runs.filled, O) that the result may be put into.

    Returns:
        (runs.filled, O) in the dtype of rows: `buffer` or a new tensor.
    """
    low, high = _flip_range(weight)
    some_flip = low <= high and (weight.dtype == torch.bfloat16 or low <= _mean_rows(runs))
    if runs.ends is not None and not some_flip and _suits_grouped_mm(rows, weight, runs):
        ends = runs.ends.to(torch.int32)
        return F.grouped_mm(rows[: runs.filled], weight.transpose(1, 2), offs=ends)
    if buffer is None:
        buffer = rows.new_empty((runs.filled, weight.shape[1]))
    cast = weight.dtype != rows.dtype
    by_row = weight.stride(2) == 1
    pieces = zip(
        runs.split(rows), runs.matrices(weight), runs.split(buffer), runs.sizes, strict=True
    )
    for piece, matrix, target, size in pieces:
        if cast:
            matrix = matrix.to(rows.dtype)
        if low <= size <= high:
            target.copy_(torch.mm(matrix, piece.t()).t())
        elif size == 1 and by_row:
            torch.mv(matrix, piece[0], out=target[0])
        else:
            torch.mm(piece, matrix.t(), out=target)
    return buffer


def mm_rows_padded(rows: Tensor, weight: Tensor, runs: Runs, num_rows: int) -> Tensor:
    """Do as `mm_rows` and add zero rows up to num_rows: (num_rows, O)."""
    if runs.filled == num_rows:
        return mm_rows(rows, weight, runs)
    padded = rows.new_empty((num_rows, weight.shape[1]))
    padded[runs.filled :].zero_()
    head = padded[: runs.filled]
    result = mm_rows(rows, weight, runs, head)
    if result is not head:
        head.copy_(result)
    return padded


def _mean_rows(runs: Runs) -> float:
    """Rows per expert that has any."""
    return runs.filled / max(len(runs.experts), 1)


def _flip_range(weight: Tensor) -> tuple[int, int]:
    """Fewest and most rows for a flipped product; the most is below the fewest if there is none."""
    none = (1, 0)
    _, outputs, inputs = weight.shape
    if weight.device.type != "cpu" or weight.stride(2) != 1:
        return none
    if weight.dtype == torch.bfloat16:
        low, high = FLIP_ROWS_BFLOAT16
        return low, min(high, inputs // FLIP_COLUMNS_PER_ROW)
    if weight.dtype == torch.float32 and inputs >= FLIP_COLUMNS_FLOAT32:
        low, high = FLIP_ROWS_FLOAT32
        return FLIP_ROWS_BIG_FLOAT32 if outputs * inputs >= FLIP_BIG_FLOAT32 else low, high
    return none


def _suits_grouped_mm(rows: Tensor, weight: Tensor, runs: Runs) -> bool:
    """Tell whether torch's own loop can take the product, and the rows are few enough."""
    if not 0 < _mean_rows(runs) <= GROUPED_MM_ROWS:
        return False
    if rows.dtype not in (torch.float32, torch.bfloat16) or weight.dtype != rows.dtype:
        return False
    if weight.device.type != "cpu" or 1 not in weight.stride()[1:]:
        return False
    itemsize = rows.element_size()
    numbers = (*weight.shape[1:], *weight.stride()[:1])
    aligned = all(number * itemsize % GROUPED_MM_ALIGNMENT == 0 for number in numbers)
    # a matrix that is not dense has a stride of its own
    dense = max(weight.stride()[1:]) in weight.shape[1:]
    addresses = (rows.data_ptr(), weight.data_ptr())
    return aligned and dense and not any(a % GROUPED_MM_ALIGNMENT for a in addresses)


def mm_weights(rows_out: Tensor, rows_in: Tensor, runs: Runs, like: Tensor) -> Tensor:
    """Sum rows_out[r] x rows_in[r] over each expert's rows.

    Args:
        rows_out: (N, O).
        rows_in: (N, I), same dtype.
        runs: The rows of each expert.
        like: (E, O, I) weight whose dtype and layout the result takes.

    Returns:
        (E, O, I); zero for an expert without rows, and not even written there if it is big.
    """
    if is_transposed(like):
        return mm_weights(rows_in, rows_out, runs, like.transpose(1, 2)).transpose(1, 2)
    idle = 1.0 - len(runs.experts) / max(like.shape[0], 1)
    gradient, is_zero = cpu_memory.gradient_like(like, idle)
    if not is_zero:
        zero_idle(gradient, runs)
    cast = like.dtype != rows_in.dtype
    pieces = zip(runs.split(rows_out), runs.split(rows_in), runs.matrices(gradient), strict=True)
    for left, right, target in pieces:
        if cast:
            target.copy_(torch.mm(left.t(), right))
        else:
            torch.mm(left.t(), right, out=target)
    return gradient


def is_transposed(weight: Tensor) -> bool:
    """Tell whether a (E, O, I) weight lies in memory as (E, I, O)."""
    return weight.stride(1) == 1 and weight.stride(2) != 1


def zero_idle(stack: Tensor, runs: Runs) -> None:
    """Zero the entries of a (E, ...) stack whose expert has no rows."""
    start = 0
    for expert in [*runs.experts, stack.shape[0]]:
        if expert > start:
            stack[start:expert].zero_()
        start = expert + 1


def add_rows(rows: Tensor, bias: Tensor, runs: Runs) -> None:
    """Add bias[expert] to each of an expert's rows, in place; bias is (E, O)."""
    for piece, row in zip(runs.split(rows), runs.matrices(bias), strict=True):
        piece.add_(row)


def sum_rows(rows: Tensor, runs: Runs, like: Tensor) -> Tensor:
    """Sum each expert's rows into (E, O), the dtype of like; zero for an expert without rows."""
    total = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    for piece, row in zip(runs.split(rows), runs.matrices(total), strict=True):
        row.copy_(piece.sum(0))
    return total
