"""Each expert's rows times its own matrix: one op with fake and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeroute_kernels.checks import autocast_to_match, require_one_dtype
from moeroute_kernels.cpu import (
    add_rows,
    compute_dtype,
    expert_runs,
    is_transposed,
    mm_rows_padded,
    mm_weights,
    sum_rows,
)

_SCHEMA = "(Tensor x, Tensor weight, Tensor expert_offsets, Tensor? bias) -> Tensor"
_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor x, Tensor weight, Tensor expert_offsets, Tensor? bias, bool[] needs)"
    " -> Tensor[]"
)


def plain_grouped_mm(
    x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """The default kernel: any device, one product per expert that has rows."""
    runs = expert_runs(expert_offsets)
    compute = compute_dtype(x)
    out = mm_rows_padded(x.to(compute).contiguous(), weight, runs, x.shape[0])
    if bias is not None:
        add_rows(out, bias, runs)
    return out.to(x.dtype)


grouped_mm_op = torch.library.custom_op(
    "moeroute::grouped_mm", plain_grouped_mm, mutates_args=(), schema=_SCHEMA
)


@grouped_mm_op.register_fake
def _(x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def plain_grouped_mm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias, those that `needs` asks for."""
    runs = expert_runs(expert_offsets)
    compute = compute_dtype(x)
    gradient = gradient.to(compute).contiguous()
    results = []
    if needs[0]:
        x_gradient = mm_rows_padded(gradient, weight.transpose(1, 2), runs, x.shape[0])
        results.append(x_gradient.to(x.dtype))
    if needs[1]:
        results.append(mm_weights(gradient, x.to(compute), runs, weight))
    if needs[2] and bias is not None:
        results.append(sum_rows(gradient, runs, bias))
    return results


grouped_mm_backward_op = torch.library.custom_op(
    "moeroute::grouped_mm_backward",
    plain_grouped_mm_backward,
    mutates_args=(),
    schema=_BACKWARD_SCHEMA,
)


@grouped_mm_backward_op.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    results = []
    if needs[0]:
        results.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    if needs[1]:
        results.append(empty_weight(weight))
    if needs[2] and bias is not None:
        results.append(torch.empty(bias.shape, dtype=bias.dtype, device=bias.device))
    return results


def empty_weight(like: Tensor) -> Tensor:
    """Storage for the gradient of a (E, O, I) weight in the layout that `mm_weights` gives it."""
    if is_transposed(like):
        flipped = (like.shape[0], like.shape[2], like.shape[1])
        return torch.empty(flipped, dtype=like.dtype, device=like.device).transpose(1, 2)
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, None
    x, weight, expert_offsets, bias = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    found = iter(grouped_mm_backward_op(gradient, x, weight, expert_offsets, bias, needs))
    x_gradient, weight_gradient, bias_gradient = (next(found) if need else None for need in needs)
    return x_gradient, weight_gradient, None, bias_gradient


torch.library.register_autograd(grouped_mm_op, _backward, setup_context=_setup_context)


def grouped_mm(
    x: Tensor, weight: Tensor, expert_offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Multiply each expert's rows with its own matrix.

    Deterministic. Gradients reach x, weight and bias, each made only if asked for; an expert
    without rows gets a zero gradient. Sums in the accumulator of the product (float32 for
    bfloat16); float16 on a CPU is computed in float32. Under autocast x, weight and bias are cast.

    Args:
        x: (N, I) rows in expert order, any strides; float64, float32, bfloat16 or float16.
        weight: (E, O, I), the dtype of x, any strides: pass a checkpoint of layout (E, I, O) as its
            `.transpose(1, 2)`, the gradient comes back in its layout.
        expert_offsets: (E,) int32 or int64 inclusive ends, as `expert_sort` gives them.
        bias: (E, O), the dtype of x, or None.

    Returns:
        (N, O) in the dtype of x. Rows past expert_offsets[-1] are never read and zero, here and in
        the gradient of x.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    x, weight, bias = autocast_to_match(x, weight, bias)
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"grouped_mm: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; "
            "give (N, I) and (E, O, I)"
        )
    if expert_offsets.shape != weight.shape[:1]:
        raise ValueError(
            f"grouped_mm: expert_offsets {tuple(expert_offsets.shape)} must be "
            f"({weight.shape[0]},), one end per matrix of weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f"grouped_mm: bias {tuple(bias.shape)} must be {tuple(weight.shape[:2])}, the (E, O) "
            "of weight"
        )
    require_one_dtype("grouped_mm", x=x, weight=weight, bias=bias)
    return grouped_mm_op(x, weight, expert_offsets, bias)
