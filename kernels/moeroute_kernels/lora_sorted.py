"""The sorted form of `gated_lora`: every expert over its own tokens, in the order of the experts.

The rows of a few experts at a time are gathered into one reused buffer, so that what the products
read is still in the cache and nothing of (N, I) or (N, O) is ever made.

Axes: T tokens, K slots per token, N = T * K rows, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHUNK_ROWS", "backward", "forward"]

CHUNK_ROWS = 256
"""Rows gathered at a time, more only where one expert alone has more; 1 MiB at 1024 features."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Neighbouring rows of whole experts.

    Attributes:
        rows: Where they stand among the sorted rows.
        experts: The experts that have rows here.
        sizes: How many each has.
    """

    rows: slice
    experts: Sequence[int]
    sizes: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Plan:
    """The filled slots in the order of their experts.

    Attributes:
        slots: (N',) int64 flat slots, N' of the N are filled.
        tokens: (N',) int64 tokens.
        gates: (N', 1) float32 or wider, scaling * weight.
        chunks: What is done at a time.
        unused: Experts without rows.
    """

    slots: Tensor
    tokens: Tensor
    gates: Tensor
    chunks: Sequence[_Chunk]
    unused: Sequence[int]

    @property
    def widest(self) -> int:
        """Rows of the largest chunk."""
        return max((chunk.rows.stop - chunk.rows.start for chunk in self.chunks), default=0)


def _plan(ids: Tensor, weights: Tensor, experts: int, scaling: float, dtype: torch.dtype) -> _Plan:
    flat = ids.reshape(-1).long()
    filled = (flat >= 0) & (flat < experts)
    flat = torch.where(filled, flat, experts)
    counts = flat.bincount(minlength=experts + 1).tolist()[:experts]
    slots = flat.argsort(stable=True)[: sum(counts)]
    wide = torch.promote_types(torch.promote_types(weights.dtype, dtype), torch.float32)
    gates = weights.reshape(-1).index_select(0, slots).to(wide).mul_(scaling).unsqueeze(1)
    unused = [expert for expert, count in enumerate(counts) if not count]
    tokens = slots // max(ids.shape[1], 1)
    return _Plan(slots, tokens, gates, list(_chunks(counts)), unused)


def _chunks(counts: Sequence[int]) -> Iterator[_Chunk]:
    start, experts, sizes = 0, [], []
    for expert, count in enumerate(counts):
        if not count:
            continue
        if sizes and sum(sizes) + count > CHUNK_ROWS:
            yield _Chunk(slice(start, start + sum(sizes)), experts, sizes)
            start, experts, sizes = start + sum(sizes), [], []
        experts.append(expert)
        sizes.append(count)
    if sizes:
        yield _Chunk(slice(start, start + sum(sizes)), experts, sizes)


def _gather(rows: Tensor, index: Tensor, buffer: Tensor) -> Tensor:
    """Rows at index, in the head of a buffer that may be of another dtype."""
    head = buffer[: index.shape[0]]
    if rows.dtype == head.dtype:
        return torch.index_select(rows, 0, index, out=head)
    return head.copy_(rows.index_select(0, index))


def _gated(ranks: Tensor, gates: Tensor) -> Tensor:
    return (ranks * gates).to(ranks.dtype)


def forward(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Two products per expert, over its tokens.

    Args:
        base: (T, O).
        x: (T, I).
        lora_a: (E, R, I).
        lora_b: (O, E, R).
        ids: (T, K).
        weights: (T, K).
        scaling: Multiplies the sum.
        dtype: To compute in.

    Returns:
        (T, O) in the dtype of base, and x A^T (N, R) of the sorted rows in dtype, for `backward`.
    """
    experts, rank, width = lora_a.shape
    plan = _plan(ids, weights, experts, scaling, dtype)
    downs, ups = (
        lora_a.to(dtype).transpose(1, 2).unbind(0),
        lora_b.to(dtype).permute(1, 2, 0).unbind(0),
    )
    middle = x.new_empty((ids.numel(), rank), dtype=dtype)
    middle[plan.slots.shape[0] :].zero_()
    wide = torch.promote_types(torch.promote_types(base.dtype, dtype), torch.float32)
    total = torch.empty_like(base, dtype=wide, memory_format=torch.contiguous_format).copy_(base)
    taken = x.new_empty((plan.widest, width), dtype=dtype)
    made = x.new_empty((plan.widest, base.shape[1]), dtype=dtype)
    for chunk in plan.chunks:
        tokens, own = plan.tokens[chunk.rows], middle[chunk.rows]
        rows = _gather(x, tokens, taken).split(chunk.sizes)
        for expert, source, target in zip(chunk.experts, rows, own.split(chunk.sizes), strict=True):
            torch.mm(source, downs[expert], out=target)
        gated, deltas = _gated(own, plan.gates[chunk.rows]), made[: own.shape[0]]
        for expert, source, target in zip(
            chunk.experts, gated.split(chunk.sizes), deltas.split(chunk.sizes), strict=True
        ):
            torch.mm(source, ups[expert], out=target)
        total.index_add_(0, tokens, deltas.to(wide))
    return total.to(base.dtype), middle


def backward(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to x, lora_a, lora_b and weights, each only where needs says so.

    Args:
        grad: (T, O).
        x: (T, I).
        middle: (N, R), of `forward`; its dtype is computed in.
        lora_a: (E, R, I).
        lora_b: (O, E, R).
        ids: (T, K).
        weights: (T, K).
        scaling: Multiplies the sum.
        needs: For x, lora_a, lora_b, weights.

    Returns:
        Four gradients in the compute dtype or wider, None where not needed.
    """
    need_x, need_a, need_b, need_weights = needs
    plan = _plan(ids, weights, lora_a.shape[0], scaling, middle.dtype)
    middle = middle[: plan.slots.shape[0]]
    ranks = torch.empty_like(middle) if need_x or need_a or need_weights else None
    grad_b = _through_up(grad, middle, lora_b, plan, ranks, need_b=need_b)
    grad_x = grad_a = grad_weights = None
    if ranks is None:
        return None, None, grad_b, None
    if need_weights:
        products = (ranks.to(plan.gates.dtype) * middle).sum(1) * scaling
        grad_weights = products.new_zeros(ids.numel()).index_copy_(0, plan.slots, products)
    if need_x or need_a:
        ranks = _gated(ranks, plan.gates)
        grad_x, grad_a = _through_down(x, ranks, lora_a, plan, need_x=need_x, need_a=need_a)
    return grad_x, grad_a, grad_b, grad_weights


def _through_up(
    grad: Tensor, middle: Tensor, lora_b: Tensor, plan: _Plan, ranks: Tensor | None, *, need_b: bool
) -> Tensor | None:
    """The gradient of lora_b, and into ranks (N', R) that of the gated middle."""
    dtype = middle.dtype
    ups, gated = lora_b.to(dtype).unbind(1), _gated(middle, plan.gates)
    grad_b = lora_b.new_empty(lora_b.shape, dtype=dtype) if need_b else None
    if grad_b is not None:
        grad_b[:, plan.unused] = 0
    taken = grad.new_empty((plan.widest, grad.shape[1]), dtype=dtype)
    for chunk in plan.chunks:
        rows = _gather(grad, plan.tokens[chunk.rows], taken).split(chunk.sizes)
        if ranks is not None:
            for expert, source, target in zip(
                chunk.experts, rows, ranks[chunk.rows].split(chunk.sizes), strict=True
            ):
                torch.mm(source, ups[expert], out=target)
        if grad_b is not None:
            for expert, source, factor in zip(
                chunk.experts, rows, gated[chunk.rows].split(chunk.sizes), strict=True
            ):
                torch.mm(source.t(), factor, out=grad_b[:, expert])
    return grad_b


def _through_down(
    x: Tensor, ranks: Tensor, lora_a: Tensor, plan: _Plan, *, need_x: bool, need_a: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and lora_a from that of the middle, ranks (N', R)."""
    dtype = ranks.dtype
    downs, wide = lora_a.to(dtype).unbind(0), torch.promote_types(dtype, torch.float32)
    grad_x = x.new_zeros(x.shape, dtype=wide) if need_x else None
    grad_a = lora_a.new_empty(lora_a.shape, dtype=dtype) if need_a else None
    if grad_a is not None:
        grad_a[plan.unused] = 0
    taken = x.new_empty((plan.widest, x.shape[1]), dtype=dtype)
    for chunk in plan.chunks:
        tokens, own = plan.tokens[chunk.rows], ranks[chunk.rows]
        factors = own.split(chunk.sizes)
        if grad_a is not None:
            rows = _gather(x, tokens, taken).split(chunk.sizes)
            for expert, factor, source in zip(chunk.experts, factors, rows, strict=True):
                torch.mm(factor.t(), source, out=grad_a[expert])
        if grad_x is not None:
            made = taken[: own.shape[0]]
            for expert, factor, target in zip(
                chunk.experts, factors, made.split(chunk.sizes), strict=True
            ):
                torch.mm(factor, downs[expert], out=target)
            grad_x.index_add_(0, tokens, made.to(grad_x.dtype))
    return grad_x, grad_a
