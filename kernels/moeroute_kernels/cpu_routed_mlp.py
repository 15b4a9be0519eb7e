"""The routed MLP in plain torch: sort, gather, product, activation, product, gather and sum.

The routing weight multiplies the activated row before the second product, so that a token's rows
are summed as they are, and so that backward finds the weight's gradient as a dot product in the
width of the experts, without their output. Pointwise work runs in float32 on pieces that stay in
the cache; the gathered rows, the experts' output and the gathered gradients take turns in one (N,
H) buffer.

Axes: T tokens, K slots per token, N = T * K rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute_kernels import cpu_memory
from moeroute_kernels.activations import activate, activate_backward, split_pre_activation
from moeroute_kernels.cpu import (
    Runs,
    add_rows,
    compute_dtype,
    expert_runs,
    mm_rows,
    mm_weights,
    sum_rows,
)
from moeroute_kernels.expert_sort import invert, sort_slots

PIECE_ELEMENTS = 2**17
"""Elements of an activated (rows, I) piece: with its neighbours in float32 it fits a 2 MB cache."""


@dataclass(frozen=True, slots=True)
class Form:
    """What kind of MLP the experts are; see `moeroute_kernels.routed_mlp`."""

    activation: str
    interleaved: bool
    alpha: float
    limit: float

    def split(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """View the gate and up parts of a pre-activation."""
        return split_pre_activation(pre, self.activation, interleaved=self.interleaved)


@dataclass(frozen=True, slots=True)
class Weights:
    """The experts' parameters: gate_up (E, 2I or I, H), down (E, H, I) and their biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def forward(
    x: Tensor, weights: Weights, ids: Tensor, routing_weights: Tensor, form: Form, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the MLP.

    Args:
        x: (T, H).
        weights: The experts.
        ids: (T, K).
        routing_weights: (T, K).
        form: The kind of MLP.
        keep: Whether the pre-activation is wanted for backward.

    Returns:
        out (T, H); pre (N, 2I or I), empty unless `keep`; order (N,); expert_offsets (E,).
    """
    order, inverse, expert_offsets = sort_slots(ids, weights.gate_up.shape[0])
    runs = expert_runs(expert_offsets)
    compute = compute_dtype(x)
    slot = order[: runs.filled]
    wide = gather(x, slot // max(ids.shape[1], 1), compute)
    pre_shape = (order.shape[0] if keep else runs.filled, weights.gate_up.shape[1])
    pre = cpu_memory.empty(pre_shape, compute, x.device)
    pre[runs.filled :].zero_()
    mm_rows(wide, weights.gate_up, runs, pre)
    if weights.gate_up_bias is not None:
        add_rows(pre, weights.gate_up_bias, runs)
    scale = routing_weights.reshape(-1).index_select(0, slot).unsqueeze(1)
    activated = wide.new_empty((runs.filled, weights.down.shape[2]))
    for rows in row_pieces(activated):
        gate, up = form.split(_widened(pre[rows]))
        value = activate(gate, up, form.activation, alpha=form.alpha, limit=form.limit)
        torch.mul(value, scale[rows], out=activated[rows])
    mm_rows(activated, weights.down, runs, wide)
    if weights.down_bias is not None:
        pieces = zip(
            runs.split(wide), runs.split(scale), runs.matrices(weights.down_bias), strict=True
        )
        for piece, share, bias in pieces:
            piece.add_(share * bias)
    out = sum_slots(wide, inverse, ids.shape[0]).to(x.dtype)
    return out, pre if keep else pre.new_empty((0, pre.shape[1])), order, expert_offsets


def backward(
    gradient: Tensor,
    x: Tensor,
    weights: Weights,
    routing_weights: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    form: Form,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, gate_up, down, routing_weights, gate_up_bias, down_bias where `needs` says
    so.

    Args:
        gradient: (T, H) of the output.
        x: As given to `forward`.
        weights: As given to `forward`.
        routing_weights: As given to `forward`.
        saved: pre, order and expert_offsets that `forward` returned.
        form: As given to `forward`.
        needs: Six booleans, in the order above.
    """
    pre, order, expert_offsets = saved
    runs = expert_runs(expert_offsets)
    need_x, need_gate_up, need_down, need_routing, need_gate_up_bias, need_down_bias = needs
    slot = order[: runs.filled]
    token = slot // max(routing_weights.shape[1], 1)
    wide = gather(gradient, token, compute_dtype(x))
    scale = routing_weights.reshape(-1).index_select(0, slot).unsqueeze(1)
    need_pre = need_x or need_gate_up or need_gate_up_bias
    inner = _Inner.make(wide, weights, runs, activated=need_down, pre=need_pre, dots=need_routing)
    inner.fill(pre, scale, form)

    results: list[Tensor | None] = [None] * 6
    if inner.activated is not None:
        results[2] = mm_weights(wide, inner.activated, runs, weights.down)
    if inner.dots is not None:
        if weights.down_bias is not None:
            _add_bias_dots(inner.dots, wide, weights.down_bias, runs)
        shares = torch.zeros_like(routing_weights, memory_format=torch.contiguous_format)
        shares.view(-1).index_copy_(0, slot, inner.dots.to(shares.dtype))
        results[3] = shares
    if need_down_bias and weights.down_bias is not None:
        results[5] = sum_rows(_widened(wide) * scale, runs, weights.down_bias)
    if inner.pre is not None:
        if need_gate_up_bias and weights.gate_up_bias is not None:
            results[4] = sum_rows(inner.pre, runs, weights.gate_up_bias)
        if need_gate_up:
            gather(x, token, wide.dtype, out=wide)
            results[1] = mm_weights(inner.pre, wide, runs, weights.gate_up)
        if need_x:
            mm_rows(inner.pre, weights.gate_up.transpose(1, 2), runs, wide)
            results[0] = sum_slots(wide, invert(order), x.shape[0]).to(x.dtype)
    return [result for result in results if result is not None]


@dataclass(frozen=True, slots=True)
class _Inner:
    """What backward needs in the width of the experts; None where nobody asks for it.

    Attributes:
        gradient: (n, I), the gradient of the activated rows before the routing weight.
        activated: (n, I), the activated rows times their routing weight.
        pre: (n, 2I or I), the gradient of the pre-activation.
        dots: (n,), the gradient of the routing weight of each row.
    """

    gradient: Tensor | None
    activated: Tensor | None
    pre: Tensor | None
    dots: Tensor | None

    @staticmethod
    def make(
        wide: Tensor, weights: Weights, runs: Runs, *, activated: bool, pre: bool, dots: bool
    ) -> _Inner:
        """Allocate; the gradient is computed from the gathered output gradients `wide` (n, H)."""
        shape = (wide.shape[0], weights.down.shape[2])
        gradient = None
        if pre or dots:
            gradient = wide.new_empty(shape)
            mm_rows(wide, weights.down.transpose(1, 2), runs, gradient)
        accumulator = torch.promote_types(wide.dtype, torch.float32)
        return _Inner(
            gradient,
            wide.new_empty(shape) if activated else None,
            wide.new_empty((shape[0], weights.gate_up.shape[1])) if pre else None,
            wide.new_empty(shape[:1], dtype=accumulator) if dots else None,
        )

    def fill(self, pre: Tensor, scale: Tensor, form: Form) -> None:
        """Compute activated, pre and dots from the pre-activation (N, 2I or I) and scale (n, 1)."""
        like = self.gradient if self.gradient is not None else self.activated
        for rows in row_pieces(like):
            gate, up = form.split(_widened(pre[rows]))
            share = scale[rows]
            options = {"alpha": form.alpha, "limit": form.limit}
            if self.activated is not None or self.dots is not None:
                value = activate(gate, up, form.activation, **options)
                if self.activated is not None:
                    torch.mul(value, share, out=self.activated[rows])
                if self.dots is not None and self.gradient is not None:
                    torch.sum(value.mul_(self.gradient[rows]), 1, out=self.dots[rows])
            if self.pre is not None and self.gradient is not None:
                scaled = self.gradient[rows] * share
                gradients = activate_backward(scaled, gate, up, form.activation, **options)
                for target, source in zip(form.split(self.pre[rows]), gradients, strict=True):
                    if target is not None and source is not None:
                        target.copy_(source)


def row_pieces(like: Tensor | None) -> Iterator[slice]:
    """Slices of the rows of an (n, I) tensor, about PIECE_ELEMENTS each."""
    if like is None:
        return
    step = max(PIECE_ELEMENTS // max(like.shape[1], 1), 1)
    for start in range(0, like.shape[0], step):
        yield slice(start, min(start + step, like.shape[0]))


def _widened(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _add_bias_dots(dots: Tensor, wide: Tensor, bias: Tensor, runs: Runs) -> None:
    pieces = zip(runs.split(dots), runs.split(wide), runs.matrices(bias), strict=True)
    for target, piece, row in pieces:
        target.add_((_widened(piece) * row).sum(1))


def gather(tokens: Tensor, index: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Gather rows (T, H) -> (n, H) in `dtype`, into `out` if given."""
    if out is None:
        out = cpu_memory.empty((index.shape[0], tokens.shape[1]), dtype, tokens.device)
    return torch.index_select(tokens.to(dtype), 0, index, out=out)


def sum_slots(rows: Tensor, inverse: Tensor, num_tokens: int) -> Tensor:
    """Sum each token's rows in slot order, in float32 (float64 for float64 rows).

    Args:
        rows: (n, H); the slots whose row is n or more are empty.
        inverse: (T * K,), the row of each flat slot.
        num_tokens: T.

    Returns:
        (T, H) in the dtype of rows, rounded once.
    """
    num_slots = inverse.shape[0] // max(num_tokens, 1)
    first = torch.arange(0, num_tokens, device=rows.device) * num_slots
    if rows.shape[0] < inverse.shape[0]:
        filled = inverse < rows.shape[0]
        ends = filled.view(num_tokens, num_slots).sum(1).cumsum(0)
        first = torch.cat([ends.new_zeros(1), ends[:-1]])
        inverse = inverse[filled]
    return torch.embedding_bag(rows, inverse, first, mode=0)[0]
