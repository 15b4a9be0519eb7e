"""Each expert's rows times its own matrix, forward and backward, on the device.

Axes: N rows, E experts, I in, O out.
"""

from __future__ import annotations

from torch import Tensor

from moeroute_kernels._triton.routed_mlp import row_major, row_major_or_none
from moeroute_kernels._triton.rows import mm_rows, tiles_for
from moeroute_kernels._triton.weights import longest_first, mm_weights, sum_rows
from moeroute_kernels.grouped_mm import empty_weight


def forward(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the product; see `moeroute_kernels.grouped_mm.grouped_mm`."""
    ends = ends.int()
    tiles = tiles_for(ends, x.shape[0], x.dtype, tail=True)
    bias = row_major_or_none(bias)
    return mm_rows(row_major(x), weight, tiles, num_rows=x.shape[0], bias=bias)


def backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias, those that `needs` asks for."""
    ends, x, gradient = ends.int(), row_major(x), row_major(gradient)
    results = []
    if needs[0]:
        tiles = tiles_for(ends, x.shape[0], x.dtype, tail=True)
        results.append(mm_rows(gradient, weight.transpose(1, 2), tiles, num_rows=x.shape[0]))
    if needs[1]:
        turns = longest_first(ends)
        results.append(mm_weights(gradient, x, ends, turns, empty_weight(weight)))
    if needs[2] and bias is not None:
        results.append(sum_rows(gradient, ends, bias))
    return results
