"""A mixture of LoRA over one linear, as one LoRA of rank E * R whose ranks are gated.

    y = base + scaling * sum_k w_k B_{e_k} A_{e_k} x
      = base + ((x A^T) * gates) B^T        with A (E * R, I), B (O, E * R)

Two forms of the same sum. Dense: two products over all E * R ranks, the gates folded in between, so
nothing wider than (T, E * R) is made. Sorted: each expert sees only its own tokens, which pays when
E * R is large and K is small. `runs_dense` chooses where the op is traced.

Axes: T tokens, K slots per token, N = T * K rows, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moeroute_kernels import lora_dense, lora_form, lora_sorted
from moeroute_kernels.lora_form import check_sizes, dense_is_faster, runs_dense

__all__ = ["gated_lora"]


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
    sizes = check_sizes(base, x, lora_a, lora_b, selected_experts, routing_weights)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        if x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
            x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return _without_autocast(
                sizes, base, x, lora_a, lora_b, selected_experts, routing_weights, scaling
            )
    return _without_autocast(
        sizes, base, x, lora_a, lora_b, selected_experts, routing_weights, scaling
    )


def _without_autocast(
    sizes: tuple[int, int, int],
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
) -> Tensor:
    inputs = (base, x, lora_a, lora_b, ids, weights, scaling)
    if not (lora_form.runs_directly(x) and lora_form.is_plain(lora_a)):
        return torch.ops.moeroute.gated_lora.default(*inputs)[0]
    if dense_is_faster(lora_a, *sizes):
        out = lora_dense.forward_if_filled(*inputs, _compute_dtype(lora_a))
        if out is not None:
            return out
    return _Direct.apply(*inputs) if torch.is_grad_enabled() else plain_forward(*inputs)[0]


def _compute_dtype(lora_a: Tensor) -> torch.dtype:
    slow_half = lora_a.dtype == torch.float16 and lora_a.device.type == "cpu"
    return torch.float32 if slow_half else lora_a.dtype


def plain_forward(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The default kernel: the answer, and what backward needs."""
    inputs = (base, x, lora_a, lora_b, ids, weights, scaling, _compute_dtype(lora_a))
    return form_of(lora_a, ids).forward(*inputs)


def form_of(lora_a: Tensor, ids: Tensor) -> ModuleType:
    """The module that computes the form which `runs_dense` chooses, in plain torch."""
    return lora_dense if runs_dense(lora_a, ids) else lora_sorted


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
    form: ModuleType,
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
    inputs = (grad, x, middle, plan, lora_a, lora_b, ids, weights, scaling, needs)
    # Backward may be called under autocast although forward was not.
    with torch.autocast(x.device.type, enabled=False):
        grads = form.backward(*inputs)
    return [
        own if own is None or own.dtype == like.dtype else own.to(like.dtype)
        for own, like in zip(grads, (x, lora_a, lora_b, weights), strict=True)
    ]


def backward_in(form: ModuleType, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward of a form; what is not wanted comes back empty, as an op must answer.

    Args:
        form: A module with a `backward` such as that of `lora_dense`.
        inputs: Those of the op "moeroute::gated_lora_backward".
    """
    grads = _gradients(form, *inputs)
    x = inputs[1]
    grad_x, grad_a, grad_b, grad_weights = (x.new_empty(0) if g is None else g for g in grads)
    return grad_x, grad_a, grad_b, grad_weights


def plain_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The default kernel of backward."""
    lora_a, ids = inputs[4], inputs[6]
    return backward_in(form_of(lora_a, ids), *inputs)


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
    if lora_form.runs_directly(grad):
        grads = _gradients(form_of(lora_a, ids), *inputs)
    else:
        found = torch.ops.moeroute.gated_lora_backward.default(*inputs)
        grads = [own if need else None for own, need in zip(found, needs, strict=True)]
    return grad if need_base else None, *grads[:3], None, grads[3], None


class _Direct(torch.autograd.Function):
    """The op without its dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Run the op's kernel. The form with a setup_context of its own costs 0.07 ms more."""
        output = plain_forward(*inputs)
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
torch.library.impl("moeroute::gated_lora", "default", plain_forward)
torch.library.impl("moeroute::gated_lora_backward", "default", plain_backward)
torch.library.register_fake("moeroute::gated_lora", _forward_fake)
torch.library.register_fake("moeroute::gated_lora_backward", _backward_fake)
torch.library.register_autograd("moeroute::gated_lora", _autograd, setup_context=_setup_context)
