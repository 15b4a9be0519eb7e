"""Grouped products as loops over the experts that have rows: the path of every device without one.

The loop lives inside an op, so a graph never sees it and autograd never indexes a weight (under
autograd each `weight[e]` costs a zero-filled gradient of the whole stack). It has no alignment rule,
takes float64 and any strides, and costs one call per expert that was hit.

Axes: N rows, E experts, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor

Runs = list[tuple[int, int, int]]
"""(expert, first row, end row) of every expert that has rows, in row order."""


def expert_runs(expert_offsets: Tensor) -> Runs:
    """Read the experts that have rows off the (E,) inclusive ends."""
    runs, start = [], 0
    for expert, end in enumerate(expert_offsets.tolist()):
        if end > start:
            runs.append((expert, start, end))
            start = end
    return runs


def compute_dtype(like: Tensor) -> torch.dtype:
    """The dtype that products are made in: float16 has no fast product on a CPU."""
    if like.dtype == torch.float16 and like.device.type == "cpu":
        return torch.float32
    return like.dtype


def mm_rows(rows: Tensor, weight: Tensor, runs: Runs, out: Tensor) -> None:
    """Write rows[s:e] @ weight[expert].T to out[s:e] for every run.

    Args:
        rows: (N, I).
        weight: (E, O, I), any strides; cast expert by expert where its dtype is not that of rows.
        runs: The rows of each expert.
        out: (N, O), same dtype as rows; rows in no run are left alone.
    """
    matrices = weight.transpose(1, 2)
    same = weight.dtype == rows.dtype
    for expert, start, end in runs:
        matrix = matrices[expert] if same else matrices[expert].to(rows.dtype)
        torch.mm(rows[start:end], matrix, out=out[start:end])


def mm_weights(rows_out: Tensor, rows_in: Tensor, runs: Runs, like: Tensor) -> Tensor:
    """Sum rows_out[r] x rows_in[r] over each expert's rows.

    Args:
        rows_out: (N, O).
        rows_in: (N, I), same dtype.
        runs: The rows of each expert.
        like: (E, O, I) weight whose dtype and layout the result takes.

    Returns:
        (E, O, I); zero for an expert without rows.
    """
    if like.stride(1) == 1 and like.stride(2) != 1:
        return mm_weights(rows_in, rows_out, runs, like.transpose(1, 2)).transpose(1, 2)
    gradient = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    same = like.dtype == rows_in.dtype
    idle = 0
    for expert, start, end in runs:
        gradient[idle:expert].zero_()
        idle = expert + 1
        left, right = rows_out[start:end].t(), rows_in[start:end]
        if same:
            torch.mm(left, right, out=gradient[expert])
        else:
            gradient[expert] = torch.mm(left, right)
    gradient[idle:].zero_()
    return gradient


def add_rows(rows: Tensor, bias: Tensor, runs: Runs) -> None:
    """Add bias[expert] to each of an expert's rows, in place; bias is (E, O)."""
    for expert, start, end in runs:
        rows[start:end] += bias[expert]


def sum_rows(rows: Tensor, runs: Runs, like: Tensor) -> Tensor:
    """Sum each expert's rows into (E, O), the dtype of like; zero for an expert without rows."""
    total = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    for expert, start, end in runs:
        total[expert] = rows[start:end].sum(0)
    return total
