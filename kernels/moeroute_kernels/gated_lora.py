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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from moeroute_kernels import lora_dense, lora_sorted

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
    inputs = (base, x, lora_a, lora_b, selected_experts, routing_weights, scaling)
    if not _runs_directly(x) or not _runs_directly(lora_a):
        return torch.ops.moeroute.gated_lora.default(*inputs)[0]
    return _Direct.apply(*inputs) if torch.is_grad_enabled() else _forward(*inputs)[0]


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


def _runs_directly(tensor: Tensor) -> bool:
    """Tell whether nobody watches or traces a tensor, so that the op's dispatch may be left out.

    Dispatch and the autograd of a custom op cost 0.2 ms, as much as all the products of 64 tokens
    over 32 ranks. Only on a CPU: another device may have a kernel of its own under the op's name.
    """
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return plain and not watched and tensor.device.type == "cpu"


def _compute_dtype(lora_a: Tensor) -> torch.dtype:
    slow_half = lora_a.dtype == torch.float16 and lora_a.device.type == "cpu"
    return torch.float32 if slow_half else lora_a.dtype


def _forward(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    form = lora_dense if runs_dense(lora_a, ids) else lora_sorted
    inputs = (base, x, lora_a, lora_b, ids, weights, scaling, _compute_dtype(lora_a))
    if not torch.is_autocast_enabled(x.device.type):
        return form.forward(*inputs)
    with torch.autocast(x.device.type, enabled=False):
        return form.forward(*inputs)


def _forward_fake(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    experts, rank, _ = lora_a.shape
    tokens, slots = ids.shape
    dtype = _compute_dtype(lora_a)
    out = base.new_empty(base.shape)
    if runs_dense(lora_a, ids):
        wide = torch.promote_types(torch.promote_types(weights.dtype, dtype), torch.float32)
        gates = weights.new_empty((tokens, experts), dtype=wide)
        return out, x.new_empty((tokens, experts * rank), dtype=dtype), gates
    order = ids.new_empty((tokens * slots,), dtype=torch.int64)
    return out, x.new_empty((tokens * slots, rank), dtype=dtype), order


def _gradients(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    plan: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    form = lora_dense if runs_dense(lora_a, ids) else lora_sorted
    inputs = (grad, x, middle, plan, lora_a, lora_b, ids, weights, scaling, needs)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            grads = form.backward(*inputs)
    else:
        grads = form.backward(*inputs)
    return [
        own if own is None or own.dtype == like.dtype else own.to(like.dtype)
        for own, like in zip(grads, (x, lora_a, lora_b, weights), strict=True)
    ]


def _backward(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    plan: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _gradients(grad, x, middle, plan, lora_a, lora_b, ids, weights, scaling, needs)
    grad_x, grad_a, grad_b, grad_weights = (x.new_empty(0) if g is None else g for g in grads)
    return grad_x, grad_a, grad_b, grad_weights


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    middle: Tensor,
    plan: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_a, need_b, need_weights = needs
    return (
        x.new_empty((ids.shape[0], lora_a.shape[2]) if need_x else (0,)),
        lora_a.new_empty(lora_a.shape) if need_a else x.new_empty((0,)),
        lora_b.new_empty(lora_b.shape) if need_b else x.new_empty((0,)),
        weights.new_empty(ids.shape) if need_weights else x.new_empty((0,)),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the wanted gradients read; what is not kept leaves its dtype behind."""
    ctx.set_materialize_grads(False)
    _, x, lora_a, lora_b, ids, weights, ctx.scaling = inputs
    _, middle, plan = output
    _, _, need_a, need_b, _, need_weights = ctx.needs_input_grad[:6]
    if not need_a:
        x = x.new_empty(0)
    if not (need_b or need_weights):
        middle = middle.new_empty(0)
    ctx.save_for_backward(x, middle, plan, lora_a, lora_b, ids, weights)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need_base, need_x, need_a, need_b, _, need_weights, _ = ctx.needs_input_grad
    if grad is None:
        return (None,) * 7
    needs = (need_x, need_a, need_b, need_weights)
    if not any(needs):
        return grad, *(None,) * 6
    x, middle, plan, lora_a, lora_b, ids, weights = ctx.saved_tensors
    inputs = (grad, x, middle, plan, lora_a, lora_b, ids, weights, ctx.scaling, needs)
    if _runs_directly(grad):
        grads = _gradients(*inputs)
    else:
        found = torch.ops.moeroute.gated_lora_backward.default(*inputs)
        grads = [own if need else None for own, need in zip(found, needs, strict=True)]
    return grad if need_base else None, *grads[:3], None, grads[3], None


class _Direct(torch.autograd.Function):
    """The op without its dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Run the op's kernel. The form with a setup_context of its own costs 0.07 ms more."""
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Run the gradient's kernel."""
        return _autograd(ctx, *grads)


_INPUTS = "Tensor lora_a, Tensor lora_b, Tensor ids, Tensor weights, float scaling"
torch.library.define(
    "moeroute::gated_lora", f"(Tensor base, Tensor x, {_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "moeroute::gated_lora_backward",
    f"(Tensor grad, Tensor x, Tensor middle, Tensor plan, {_INPUTS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("moeroute::gated_lora", "default", _forward)
torch.library.impl("moeroute::gated_lora_backward", "default", _backward)
torch.library.register_fake("moeroute::gated_lora", _forward_fake)
torch.library.register_fake("moeroute::gated_lora_backward", _backward_fake)
torch.library.register_autograd("moeroute::gated_lora", _autograd, setup_context=_setup_context)
