"""A mixture of LoRA over one linear, as one LoRA of rank E * R whose ranks are gated.

    y = base + scaling * sum_k w_k B_{e_k} A_{e_k} x
      = base + ((x A^T) * gates) B^T        with A (E * R, I), B (O, E * R)

Two forms of the same sum. Dense: two products over all E * R ranks, the gates folded in between, so
nothing wider than (T, E * R) is made. Sorted: each expert sees only its own tokens, which pays when
E * R is large and K is small. `runs_dense` chooses.

Axes: T tokens, K slots per token, N = T * K rows, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["DENSE_RANKS", "gated_lora", "runs_dense"]

DENSE_RANKS = 256
"""Ranks that the dense form may compute beyond the K * R that are needed; measured."""


def runs_dense(lora_a: Tensor, selected_experts: Tensor) -> bool:
    """Whether the dense form is used: a matter of static sizes, never of the number of tokens.

    Args:
        lora_a: (E, R, I).
        selected_experts: (T, K).

    Returns:
        True when all ranks together are few enough, or every expert has a slot anyway.
    """
    experts, rank = lora_a.shape[:2]
    unused = experts - min(selected_experts.shape[1], experts)
    return unused * rank <= DENSE_RANKS


def gated_lora(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    scaling: float,
) -> Tensor:
    """Add a routed mixture of LoRA to the output of the linear it adapts.

    Computed in the dtype of lora_a (float32 for float16 on a CPU), added in float32 or wider and
    rounded once to the dtype of base; with lora_b at zero the result equals base bit for bit. Under
    autocast x, lora_a and lora_b take the autocast dtype. Deterministic. An id that stands twice in
    a token counts twice. Differentiable once in base, x, lora_a, lora_b and routing_weights; what
    needs no gradient costs no work and is not kept.

    Args:
        base: (T, O), what the frozen linear answered.
        x: (T, I), what it was asked.
        lora_a: (E, R, I), a view of one (E * R, I) parameter.
        lora_b: (O, E, R), a view of one (O, E * R) parameter.
        selected_experts: (T, K) integers; anything outside [0, E) is an empty slot, whose weight is
            not read.
        routing_weights: (T, K), any floating dtype.
        scaling: Multiplies the whole sum.

    Returns:
        (T, O) in the dtype of base, contiguous.

    Raises:
        ValueError: Sizes that do not belong together, or ids that are not integers.
    """
    _check(base, x, lora_a, lora_b, selected_experts, routing_weights)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    out, _ = _forward(base, x, lora_a, lora_b, selected_experts, routing_weights, float(scaling))
    return out


def _check(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor
) -> None:
    if lora_a.dim() != 3 or lora_b.dim() != 3 or lora_b.shape[1:] != lora_a.shape[:2]:
        raise ValueError(
            f"gated_lora: lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} must be "
            "(E, R, I) and (O, E, R)"
        )
    tokens = x.shape[0]
    if x.dim() != 2 or x.shape[1] != lora_a.shape[2]:
        raise ValueError(
            f"gated_lora: x {tuple(x.shape)} must be (T, {lora_a.shape[2]}), as wide as lora_a"
        )
    if base.dim() != 2 or base.shape[0] != tokens or base.shape[1] != lora_b.shape[0]:
        raise ValueError(
            f"gated_lora: base {tuple(base.shape)} must be ({tokens}, {lora_b.shape[0]}), "
            "one row per token of x, as wide as lora_b"
        )
    if ids.dim() != 2 or ids.shape[0] != tokens or weights.shape != ids.shape:
        raise ValueError(
            f"gated_lora: selected_experts {tuple(ids.shape)} and routing_weights "
            f"{tuple(weights.shape)} must both be ({tokens}, K)"
        )
    if ids.is_floating_point() or not weights.is_floating_point():
        raise ValueError(
            f"gated_lora: selected_experts ({ids.dtype}) must be integers and routing_weights "
            f"({weights.dtype}) floating"
        )


def _compute_dtype(lora_a: Tensor) -> torch.dtype:
    slow_half = lora_a.dtype == torch.float16 and lora_a.device.type == "cpu"
    return torch.float32 if slow_half else lora_a.dtype


def _middle_shape(x: Tensor, lora_a: Tensor, ids: Tensor) -> tuple[int, int]:
    experts, rank = lora_a.shape[:2]
    if runs_dense(lora_a, ids):
        return x.shape[0], experts * rank
    return x.shape[0] * ids.shape[1], rank


@torch.library.custom_op("moeroute::gated_lora", mutates_args=())
def _forward(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    form = _Dense if runs_dense(lora_a, ids) else _Sorted
    with torch.autocast(x.device.type, enabled=False):
        return form(x, lora_a, ids, weights, scaling).forward(base, lora_b)


@_forward.register_fake
def _(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    middle = x.new_empty(_middle_shape(x, lora_a, ids), dtype=_compute_dtype(lora_a))
    return base.new_empty(base.shape), middle


@torch.library.custom_op("moeroute::gated_lora_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form = _Dense if runs_dense(lora_a, ids) else _Sorted
    with torch.autocast(x.device.type, enabled=False):
        grads = form(x, lora_a, ids, weights, scaling).backward(grad, middle, lora_b, needs)
    like = (x, lora_a, lora_b, weights)
    return tuple(
        x.new_empty(0) if g is None else g.to(t.dtype).view(t.shape)
        for g, t in zip(grads, like, strict=True)
    )


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (x, lora_a, lora_b, weights)
    return tuple(
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip(like, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, lora_a, lora_b, ids, weights, scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.scaling = scaling
    ctx.save_for_backward(x, output[1], lora_a, lora_b, ids, weights)


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    need_base, *needs = ctx.needs_input_grad[:4]
    needs = (*needs, ctx.needs_input_grad[5])
    if grad is None:
        return (None,) * 7
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if any(needs):
        found = _backward(grad, *ctx.saved_tensors, ctx.scaling, needs)
        grads = tuple(g if need else None for g, need in zip(found, needs, strict=True))
    return grad if need_base else None, *grads[:3], None, grads[3], None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Dense:
    """All E * R ranks of every token, most of them gated to zero."""

    def __init__(
        self, x: Tensor, lora_a: Tensor, ids: Tensor, weights: Tensor, scaling: float
    ) -> None:
        self.dtype = _compute_dtype(lora_a)
        self.experts, self.rank, width = lora_a.shape
        self.scaling = scaling
        valid = (ids >= 0) & (ids < self.experts)
        self.slots = torch.where(valid, ids, self.experts).long()
        self.live = valid.any(1, keepdim=True)
        self.x = self._live_rows(x)
        self.lora_a = lora_a.reshape(self.experts * self.rank, width).to(self.dtype)
        # The last column takes the empty slots' weights and is dropped.
        gates = weights.new_zeros(
            (x.shape[0], self.experts + 1), dtype=torch.promote_types(weights.dtype, self.dtype)
        )
        gates.scatter_add_(1, self.slots, weights.to(gates.dtype))
        self.gates = (gates[:, :-1] * scaling).to(torch.promote_types(self.dtype, torch.float32))

    def _live_rows(self, rows: Tensor) -> Tensor:
        if rows.device.type == "cpu" and bool(self.live.all()):
            return rows.to(self.dtype)
        return rows.to(self.dtype).masked_fill(~self.live, 0)

    def _gate(self, ranks: Tensor) -> Tensor:
        per_expert = ranks.view(-1, self.experts, self.rank) * self.gates.unsqueeze(2)
        return per_expert.to(self.dtype).view(ranks.shape)

    def forward(self, base: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.x @ self.lora_a.t()
        b = lora_b.reshape(lora_b.shape[0], -1).to(self.dtype)
        if base.dtype == self.dtype:
            return torch.addmm(base, self._gate(middle), b.t()), middle
        return (base + self._gate(middle) @ b.t()).to(base.dtype), middle

    def backward(
        self, grad: Tensor, middle: Tensor, lora_b: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        need_x, need_a, need_b, need_weights = needs
        grad_x = grad_a = grad_b = grad_weights = None
        grad = self._live_rows(grad)
        if need_b:
            grad_b = grad.t() @ self._gate(middle)
        if need_x or need_a or need_weights:
            ranks = grad @ lora_b.reshape(lora_b.shape[0], -1).to(self.dtype)
            if need_weights:
                gates = (ranks.to(self.gates.dtype) * middle).view(-1, self.experts, self.rank)
                gates = torch.nn.functional.pad(gates.sum(2) * self.scaling, (0, 1))
                grad_weights = gates.gather(1, self.slots)
            if need_x or need_a:
                ranks = self._gate(ranks)
            if need_a:
                grad_a = ranks.t() @ self.x
            if need_x:
                grad_x = ranks @ self.lora_a
        return grad_x, grad_a, grad_b, grad_weights


class _Sorted:
    """Every expert over its own tokens, in the order of the experts."""

    def __init__(
        self, x: Tensor, lora_a: Tensor, ids: Tensor, weights: Tensor, scaling: float
    ) -> None:
        self.dtype = _compute_dtype(lora_a)
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.x, self.lora_a, self.scaling = x, lora_a.to(self.dtype), scaling
        self.gates = weights.reshape(-1).to(self.wide) * scaling
        experts, slots = lora_a.shape[0], ids.shape[1]
        flat = ids.reshape(-1).long()
        flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=experts + 1).tolist()[:experts]
        self.rows = order.split([*counts, order.numel() - sum(counts)])[:experts]
        self.tokens = [rows // slots for rows in self.rows]
        self.ends = [sum(counts[: expert + 1]) for expert in range(experts)]

    def forward(self, base: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        rank = self.lora_a.shape[1]
        middle = self.x.new_zeros((self.gates.shape[0], rank), dtype=self.dtype)
        total = base.to(torch.promote_types(base.dtype, self.wide), copy=True)
        total = total.contiguous()
        b = lora_b.to(self.dtype)
        for expert, (rows, tokens) in enumerate(zip(self.rows, self.tokens, strict=True)):
            end = self.ends[expert]
            ranks = middle[end - rows.numel() : end]
            torch.mm(self.x[tokens].to(self.dtype), self.lora_a[expert].t(), out=ranks)
            gated = (ranks * self.gates[rows].unsqueeze(1)).to(self.dtype)
            total.index_add_(0, tokens, (gated @ b[:, expert].t()).to(total.dtype))
        return total.to(base.dtype), middle

    def backward(
        self, grad: Tensor, middle: Tensor, lora_b: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        need_x, need_a, need_b, need_weights = needs
        b = lora_b.to(self.dtype)
        grad_x = (
            torch.zeros_like(self.x, dtype=self.wide, memory_format=torch.contiguous_format)
            if need_x
            else None
        )
        grad_a = (
            torch.zeros_like(self.lora_a, memory_format=torch.contiguous_format) if need_a else None
        )
        grad_b = torch.zeros_like(b, memory_format=torch.contiguous_format) if need_b else None
        grad_weights = torch.zeros_like(self.gates) if need_weights else None
        for expert, (rows, tokens) in enumerate(zip(self.rows, self.tokens, strict=True)):
            end = self.ends[expert]
            own = middle[end - rows.numel() : end]
            gate = self.gates[rows].unsqueeze(1)
            out = grad[tokens].to(self.dtype)
            if grad_b is not None:
                grad_b[:, expert] = out.t() @ (own * gate).to(self.dtype)
            if not (need_x or need_a or need_weights):
                continue
            ranks = out @ b[:, expert]
            if grad_weights is not None:
                grad_weights[rows] = (ranks.to(self.wide) * own).sum(1) * self.scaling
            ranks = (ranks * gate).to(self.dtype)
            if grad_a is not None:
                grad_a[expert] = ranks.t() @ self.x[tokens].to(self.dtype)
            if grad_x is not None:
                grad_x.index_add_(0, tokens, (ranks @ self.lora_a[expert]).to(self.wide))
        return grad_x, grad_a, grad_b, grad_weights
