"""Backward of the routed MLP in plain torch; see `moeroute_kernels.cpu_routed_mlp`.

With g = the gathered output gradient of a row, w its routing weight, a its activated row:

    inner = down^T g            da = w * inner        dw = inner . a (+ g . down_bias)
    ddown = sum g (w a)^T       dpre = act'(da)       dgate_up = sum dpre x^T
    dx    = sum over a token's rows of gate_up^T dpre

Axes: T tokens, K slots per token, N = T * K rows, n filled rows, E experts, H hidden, I
intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute_kernels.activations import activate, activate_backward
from moeroute_kernels.cpu import (
    Runs,
    compute_dtype,
    expert_runs,
    mm_rows,
    mm_weights,
    sum_rows,
)
from moeroute_kernels.cpu_routed_mlp import Form, Saved, Weights
from moeroute_kernels.cpu_rows import gather, row_pieces, sum_slots, to_slots, widened
from moeroute_kernels.expert_sort import invert


@dataclass(frozen=True, slots=True)
class Needs:
    """Which gradients are wanted, in the order in which they are returned."""

    x: bool
    gate_up: bool
    down: bool
    routing_weights: bool
    gate_up_bias: bool
    down_bias: bool

    @property
    def pre(self) -> bool:
        """Whether the gradient of the pre-activation is wanted."""
        return self.x or self.gate_up or self.gate_up_bias


def backward(
    gradient: Tensor,
    x: Tensor,
    weights: Weights,
    routing_weights: Tensor,
    saved: Saved,
    form: Form,
    needs: Needs,
) -> list[Tensor]:
    """Compute the wanted gradients.

    Args:
        gradient: (T, H) of the output.
        x: As given to `forward`.
        weights: As given to `forward`.
        routing_weights: As given to `forward`.
        saved: As `forward` returned it.
        form: As given to `forward`.
        needs: What is wanted.

    Returns:
        The wanted gradients in the order of `Needs`, each in the shape, dtype and layout of what it
        is the gradient of.
    """
    runs = expert_runs(saved.expert_offsets)
    slot = saved.order[: runs.filled]
    token = slot // max(routing_weights.shape[1], 1)
    wide = gather(gradient, token, compute_dtype(x))
    scale = routing_weights.reshape(-1).index_select(0, slot).unsqueeze(1)
    inner = _inner(wide, weights, runs, needs)
    inner.fill(saved.pre, scale, form)

    x_gradient = gate_up_gradient = down_gradient = routing_gradient = None
    gate_up_bias_gradient = down_bias_gradient = None
    if inner.activated is not None:
        down_gradient = mm_weights(wide, inner.activated, runs, weights.down)
    if inner.dots is not None:
        _add_bias_dots(inner.dots, wide, weights.down_bias, runs)
        routing_gradient = to_slots(inner.dots, slot, routing_weights)
    if needs.down_bias and weights.down_bias is not None:
        down_bias_gradient = sum_rows(widened(wide) * scale, runs, weights.down_bias)
    if needs.gate_up_bias and inner.pre is not None and weights.gate_up_bias is not None:
        gate_up_bias_gradient = sum_rows(inner.pre, runs, weights.gate_up_bias)
    # from here on the output gradients are done with, and their buffer is used again
    if needs.gate_up and inner.pre is not None:
        rows = gather(x, token, wide.dtype, out=wide)
        gate_up_gradient = mm_weights(inner.pre, rows, runs, weights.gate_up)
    if needs.x and inner.pre is not None:
        rows = mm_rows(inner.pre, weights.gate_up.transpose(1, 2), runs, wide)
        x_gradient = sum_slots(rows, invert(saved.order), x.shape[0]).to(x.dtype)
    found = (
        x_gradient,
        gate_up_gradient,
        down_gradient,
        routing_gradient,
        gate_up_bias_gradient,
        down_bias_gradient,
    )
    return [result for result in found if result is not None]


@dataclass(frozen=True, slots=True)
class _Inner:
    """What is needed in the width of the experts; None where nobody asks for it.

    Attributes:
        gradient: (n, I), the gradient of the activated rows before the routing weight.
        activated: (n, I), the activated rows times their routing weight.
        pre: (n, 2I or I), the gradient of the pre-activation.
        dots: (n,), the gradient of each row's routing weight.
    """

    gradient: Tensor | None
    activated: Tensor | None
    pre: Tensor | None
    dots: Tensor | None

    def fill(self, pre: Tensor, scale: Tensor, form: Form) -> None:
        """Compute activated, pre and dots.

        Args:
            pre: (N, 2I or I), the pre-activation.
            scale: (n, 1), the routing weight of each row.
            form: The kind of MLP.
        """
        like = self.activated if self.gradient is None else self.gradient
        if like is None:
            return
        for rows in row_pieces(like):
            gate, up = form.split(widened(pre[rows]))
            share = scale[rows]
            if self.activated is not None or self.dots is not None:
                value = activate(gate, up, form.activation, alpha=form.alpha, limit=form.limit)
                if self.activated is not None:
                    torch.mul(value, share, out=self.activated[rows])
                if self.dots is not None and self.gradient is not None:
                    torch.sum(value.mul_(self.gradient[rows]), 1, out=self.dots[rows])
            if self.pre is not None and self.gradient is not None:
                scaled = self.gradient[rows] * share
                _write_pre_gradient(self.pre[rows], scaled, gate, up, form)


def _inner(wide: Tensor, weights: Weights, runs: Runs, needs: Needs) -> _Inner:
    """Allocate what is needed, and compute the gradient of the activated rows from (n, H)."""
    num_rows, width = wide.shape[0], weights.down.shape[2]
    gradient = None
    if needs.pre or needs.routing_weights:
        gradient = mm_rows(wide, weights.down.transpose(1, 2), runs)
    accumulator = torch.promote_types(wide.dtype, torch.float32)
    return _Inner(
        gradient=gradient,
        activated=wide.new_empty((num_rows, width)) if needs.down else None,
        pre=wide.new_empty((num_rows, weights.gate_up.shape[1])) if needs.pre else None,
        dots=wide.new_empty((num_rows,), dtype=accumulator) if needs.routing_weights else None,
    )


def _write_pre_gradient(
    out: Tensor, gradient: Tensor, gate: Tensor, up: Tensor | None, form: Form
) -> None:
    gate_gradient, up_gradient = activate_backward(
        gradient, gate, up, form.activation, alpha=form.alpha, limit=form.limit
    )
    gate_out, up_out = form.split(out)
    gate_out.copy_(gate_gradient)
    if up_out is not None and up_gradient is not None:
        up_out.copy_(up_gradient)


def _add_bias_dots(dots: Tensor, wide: Tensor, bias: Tensor | None, runs: Runs) -> None:
    if bias is None:
        return
    pieces = zip(runs.split(dots), runs.split(wide), runs.matrices(bias), strict=True)
    for target, piece, row in pieces:
        target.add_((widened(piece) * row).sum(1))
