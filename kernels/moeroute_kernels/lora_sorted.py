"""The sorted form of `gated_lora`: every expert over its own tokens, in the order of the experts.

The rows of a few experts at a time are gathered into one reused buffer, so that what the products
read is still in the cache and nothing of (N, I) or (N, O) is ever made.

Axes: T tokens, K slots, N = T * K rows, N' of them filled, E experts, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moeroute_kernels.lora_slots import all_filled

__all__ = ["CHUNK_ROWS", "backward", "forward"]

CHUNK_ROWS = 1024
"""Rows gathered at a time, more only where one expert alone has more; 4 MiB at 1024 features."""
GROUPED_MM_ROWS = 32
"""Rows per expert up to which the loop inside torch, which makes a new tensor, is faster."""
GROUPED_MM_ALIGNMENT = 16
"""Bytes that strides and addresses must be a multiple of to be taken by the loop inside torch."""


@dataclass(slots=True)
class _Chunk:
    """Neighbouring rows of whole experts.

    Attributes:
        rows: Where they stand among the sorted rows.
        experts: The experts that have rows here.
        sizes: How many each has.
        ends: (E,) int32 inclusive ends when the loop inside torch takes the products, or None.
    """

    rows: slice
    experts: list[int]
    sizes: list[int]
    ends: Tensor | None = None


@dataclass(slots=True)
class _Plan:
    """The filled slots in the order of their experts.

    Attributes:
        slots: (N',) int64 flat slots.
        tokens: (N',) int64 tokens.
        gates: (N', 1) float32 or wider, scaling * weight.
        chunks: What is done at a time.
        unused: Experts without rows.
    """

    slots: Tensor
    tokens: Tensor
    gates: Tensor
    chunks: list[_Chunk]
    unused: list[int]

    def buffer(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for the rows of the largest chunk, as wide as like (T, I)."""
        rows = max((chunk.rows.stop - chunk.rows.start for chunk in self.chunks), default=0)
        return like.new_empty((rows, like.shape[1]), dtype=dtype)


def _plan(
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    order: Tensor | None,
    lora: tuple[Tensor, Tensor],
) -> tuple[_Plan, Tensor]:
    """Make the plan, and the order (N,) of all slots unless it is given."""
    experts = lora[0].shape[0]
    flat = ids.reshape(-1).long()
    if not all_filled(ids, experts):
        flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    counts = flat.bincount(minlength=experts).tolist()[:experts]
    if order is None:
        order = flat.argsort(stable=True)
    filled = sum(counts)
    slots = order if filled == order.shape[0] else order[:filled]
    wide = torch.promote_types(torch.promote_types(weights.dtype, lora[0].dtype), torch.float32)
    gates = weights.reshape(-1).index_select(0, slots).to(wide).mul_(scaling).unsqueeze(1)
    chunks = list(_chunks(counts))
    if len(chunks) == 1 and filled <= GROUPED_MM_ROWS * experts and _suit_grouped_mm(*lora):
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        chunks[0].ends = ends
    unused = [expert for expert, count in enumerate(counts) if not count]
    return _Plan(slots, slots // max(ids.shape[1], 1), gates, chunks, unused), order


def _chunks(counts: Sequence[int]) -> Iterator[_Chunk]:
    start = end = 0
    experts: list[int] = []
    for expert, count in enumerate(counts):
        if not count:
            continue
        if experts and end - start + count > CHUNK_ROWS:
            yield _Chunk(slice(start, end), experts, [counts[own] for own in experts])
            start, experts = end, []
        experts.append(expert)
        end += count
    if experts:
        yield _Chunk(slice(start, end), experts, [counts[own] for own in experts])


def _suit_grouped_mm(lora_a: Tensor, lora_b: Tensor) -> bool:
    """Tell whether the loop inside torch takes products with these stacks: it is particular."""
    if lora_a.device.type != "cpu" or lora_a.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not lora_a.is_contiguous() or not lora_b.is_contiguous():
        return False
    numbers = (lora_a.shape[1], lora_a.shape[2], lora_b.shape[0])
    bytes_ = [number * lora_a.element_size() for number in numbers]
    return not any(
        number % GROUPED_MM_ALIGNMENT for number in (*bytes_, lora_a.data_ptr(), lora_b.data_ptr())
    )


def _gather(rows: Tensor, index: Tensor, buffer: Tensor) -> Tensor:
    """Rows at index, in the head of a buffer that may be of another dtype."""
    head = buffer[: index.shape[0]]
    if rows.dtype == head.dtype:
        return torch.index_select(rows, 0, index, out=head)
    return head.copy_(rows.index_select(0, index))


def _times(rows: Tensor, stack: Tensor, chunk: _Chunk, out: Tensor) -> Tensor:
    """Each expert's rows (n, A) times its matrix of stack (E, A, B): (n, B), in out or new."""
    if chunk.ends is not None:
        return F.grouped_mm(rows, stack, offs=chunk.ends)
    pieces = zip(chunk.experts, rows.split(chunk.sizes), out.split(chunk.sizes), strict=True)
    for expert, source, target in pieces:
        torch.mm(source, stack[expert], out=target)
    return out


def _outer(left: Tensor, right: Tensor, chunk: _Chunk, stack: Tensor) -> None:
    """Put left^T right over each expert's rows (n, A) and (n, B) into stack (E, A, B)."""
    pieces = zip(chunk.experts, left.split(chunk.sizes), right.split(chunk.sizes), strict=True)
    for expert, first, second in pieces:
        torch.mm(first.t(), second, out=stack[expert])


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
) -> tuple[Tensor, Tensor, Tensor]:
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
        (T, O) in the dtype of base, and for `backward` x A^T (N, R) of the sorted rows in dtype and
        the order of the slots (N,) int64, the empty ones last.
    """
    lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    plan, order = _plan(ids, weights, scaling, None, (lora_a, lora_b))
    downs, ups = lora_a.transpose(1, 2), lora_b.permute(1, 2, 0)
    middle = x.new_empty((order.shape[0], lora_a.shape[1]), dtype=dtype)
    middle[plan.slots.shape[0] :].zero_()
    wide = torch.promote_types(torch.promote_types(base.dtype, dtype), torch.float32)
    total = torch.empty_like(base, dtype=wide, memory_format=torch.contiguous_format).copy_(base)
    taken, made = plan.buffer(x, dtype), plan.buffer(base, dtype)
    for chunk in plan.chunks:
        tokens, own = plan.tokens[chunk.rows], middle[chunk.rows]
        ranks = _times(_gather(x, tokens, taken), downs, chunk, own)
        if ranks is not own:
            own.copy_(ranks)
        gated = _gated(ranks, plan.gates[chunk.rows])
        deltas = _times(gated, ups, chunk, made[: own.shape[0]])
        total.index_add_(0, tokens, deltas.to(wide))
    return total.to(base.dtype), middle, order


def backward(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    order: Tensor,
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
        x: (T, I); read for lora_a alone.
        middle: (N, R), of `forward`; its dtype is computed in. Read for lora_b and weights.
        order: (N,), of `forward`.
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
    dtype = middle.dtype
    lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    plan, _ = _plan(ids, weights, scaling, order, (lora_a, lora_b))
    filled = plan.slots.shape[0]
    ranks = grad_b = gated = None
    if need_x or need_a or need_weights:
        ranks = grad.new_empty((filled, lora_a.shape[1]), dtype=dtype)
    if need_b:
        gated = _gated(middle[:filled], plan.gates)
        grad_b = lora_b.new_empty(lora_b.shape)
        grad_b[:, plan.unused] = 0
    _through_up(grad, lora_b, plan, ranks, gated, grad_b)
    if ranks is None:
        return None, None, grad_b, None
    grad_weights = None
    if need_weights:
        products = (ranks.to(plan.gates.dtype) * middle[:filled]).sum(1).mul_(scaling)
        grad_weights = products.new_zeros(order.shape[0]).index_copy_(0, plan.slots, products)
        grad_weights = grad_weights.view(ids.shape)
    grad_a = torch.empty_like(lora_a, memory_format=torch.contiguous_format) if need_a else None
    wide = torch.promote_types(dtype, torch.float32)
    shape = (ids.shape[0], lora_a.shape[2])
    grad_x = x.new_zeros(shape, dtype=wide) if need_x else None
    if need_x or need_a:
        _through_down(x, _gated(ranks, plan.gates), lora_a, plan, grad_x, grad_a)
    return grad_x, grad_a, grad_b, grad_weights


def _through_up(
    grad: Tensor,
    lora_b: Tensor,
    plan: _Plan,
    ranks: Tensor | None,
    gated: Tensor | None,
    grad_b: Tensor | None,
) -> None:
    """Fill ranks (N', R), the gradient of the gated middle, and grad_b (O, E, R)."""
    ups, taken = lora_b.permute(1, 0, 2), plan.buffer(grad, lora_b.dtype)
    for chunk in plan.chunks:
        rows = _gather(grad, plan.tokens[chunk.rows], taken)
        if ranks is not None:
            own = ranks[chunk.rows]
            found = _times(rows, ups, chunk, own)
            if found is not own:
                own.copy_(found)
        if grad_b is not None and gated is not None:
            _outer(rows, gated[chunk.rows], chunk, grad_b.permute(1, 0, 2))


def _through_down(
    x: Tensor,
    ranks: Tensor,
    lora_a: Tensor,
    plan: _Plan,
    grad_x: Tensor | None,
    grad_a: Tensor | None,
) -> None:
    """Fill grad_x (T, I), zero before, and grad_a (E, R, I) from ranks (N', R)."""
    if grad_a is not None:
        grad_a[plan.unused] = 0
    taken = plan.buffer(x if grad_x is None else grad_x, lora_a.dtype)
    for chunk in plan.chunks:
        tokens, own = plan.tokens[chunk.rows], ranks[chunk.rows]
        if grad_a is not None:
            rows = _gather(x, tokens, taken)
            _outer(own, rows, chunk, grad_a)
        if grad_x is not None:
            rows = _times(own, lora_a, chunk, taken[: own.shape[0]])
            grad_x.index_add_(0, tokens, rows.to(grad_x.dtype))
