"""The whole routed MLP as one op: gather, product, activation, product, weighted sum.

Saves x, the pre-activation and the order of the rows for backward, nothing else (beside the weights
and routing weights themselves): about T * H + N * 2I elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeroute_kernels import cpu_routed_mlp, cpu_routed_mlp_backward
from moeroute_kernels.checks import (
    autocast_to_match,
    check_activation,
    check_biases,
    check_shapes,
    require_one_dtype,
)
from moeroute_kernels.cpu import compute_dtype
from moeroute_kernels.cpu_routed_mlp import Form, Saved, Weights
from moeroute_kernels.cpu_routed_mlp_backward import Needs
from moeroute_kernels.grouped_mm import empty_weight

_SCHEMA = (
    "(Tensor x, Tensor gate_up, Tensor down, Tensor selected_experts, Tensor routing_weights,"
    " Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, float alpha,"
    " float limit, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor x, Tensor gate_up, Tensor down, Tensor routing_weights,"
    " Tensor? gate_up_bias, Tensor? down_bias, Tensor pre, Tensor order, Tensor expert_offsets,"
    " str activation, bool interleaved, float alpha, float limit, bool[] needs) -> Tensor[]"
)


def plain_routed_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The default kernel, any device: returns out, pre, order and expert_offsets."""
    weights = Weights(gate_up, down, gate_up_bias, down_bias)
    form = Form(activation, interleaved, alpha, limit)
    if not keep and x.shape[0] == 1:
        out = cpu_routed_mlp.decode(x, weights, selected_experts, routing_weights, form)
    else:
        out, saved = cpu_routed_mlp.forward(x, weights, selected_experts, routing_weights, form)
        if keep:
            return out, saved.pre, saved.order, saved.expert_offsets
    return out, *saved_storage(x, gate_up, 0, 0)


routed_mlp_op = torch.library.custom_op(
    "moeroute::routed_mlp", plain_routed_mlp, mutates_args=(), schema=_SCHEMA
)


def saved_storage(
    x: Tensor, gate_up: Tensor, num_rows: int, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Storage for the pre-activation, the order of the rows and the experts' ends."""
    return (
        torch.empty((num_rows, gate_up.shape[1]), dtype=compute_dtype(x), device=x.device),
        torch.empty((num_rows,), dtype=torch.int64, device=x.device),
        torch.empty((num_groups,), dtype=torch.int32, device=x.device),
    )


@routed_mlp_op.register_fake
def _(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = x.new_empty((x.shape[0], down.shape[1]))
    num_rows, num_experts = (selected_experts.numel(), gate_up.shape[0]) if keep else (0, 0)
    return out, *saved_storage(x, gate_up, num_rows, num_experts)


def plain_routed_mlp_backward(
    gradient: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    order: Tensor,
    expert_offsets: Tensor,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: list[bool],
) -> list[Tensor]:
    """The default kernel, any device: the gradients that `needs` asks for, in that order."""
    weights = Weights(gate_up, down, gate_up_bias, down_bias)
    form = Form(activation, interleaved, alpha, limit)
    saved = Saved(pre, order, expert_offsets)
    return cpu_routed_mlp_backward.backward(
        gradient, x, weights, routing_weights, saved, form, Needs(*needs)
    )


routed_mlp_backward_op = torch.library.custom_op(
    "moeroute::routed_mlp_backward",
    plain_routed_mlp_backward,
    mutates_args=(),
    schema=_BACKWARD_SCHEMA,
)


@routed_mlp_backward_op.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    order: Tensor,
    expert_offsets: Tensor,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (x, gate_up, down, routing_weights, gate_up_bias, down_bias)
    results = []
    for need, like in zip(needs, inputs, strict=True):
        if need and like is not None:
            weight = like is gate_up or like is down
            plain = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            results.append(empty_weight(like) if weight else plain)
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, _, routing_weights, gate_up_bias, down_bias, *form, keep = inputs
    if not keep:
        raise ValueError(
            "routed_mlp: an input requires grad, so the op must be called with keep=True"
        )
    _, pre, order, expert_offsets = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre, order, expert_offsets)
    ctx.form = form
    ctx.save_for_backward(
        x, gate_up, down, routing_weights, gate_up_bias, down_bias, pre, order, expert_offsets
    )


_DIFFERENTIABLE = (0, 1, 2, 4, 5, 6)
_NUM_INPUTS = 12


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    results: list[Tensor | None] = [None] * _NUM_INPUTS
    if gradient is not None:
        needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        found = routed_mlp_backward_op(gradient, *ctx.saved_tensors, *ctx.form, needs)
        wanted = [i for i in _DIFFERENTIABLE if ctx.needs_input_grad[i]]
        for i, result in zip(wanted, found, strict=True):
            results[i] = result
    return tuple(results)


torch.library.register_autograd(routed_mlp_op, _backward, setup_context=_setup_context)


def routed_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu_glu",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = float("inf"),
) -> Tensor:
    """Send every token through its experts' MLPs and sum with the routing weights.

        y[t] = sum_k w[t, k] * (down[e] act(gate_up[e] x[t] + b1[e]) + b2[e]),  e = ids[t, k]

    Deterministic; a token's slots are summed in float32 and in slot order. Gradients reach x, the
    weights, the biases and routing_weights, each made only if asked for; an expert without rows
    gets a zero gradient. float16 on a CPU is computed in float32. Under autocast x, weights and
    biases are cast, routing_weights is not.

    Args:
        x: (T, H), any strides; float64, float32, bfloat16 or float16.
        gate_up: (E, 2I, H) for a gated activation, (E, I, H) otherwise, the dtype of x, any
            strides: pass a transposed checkpoint as its `.transpose(1, 2)`.
        down: (E, H, I), likewise.
        selected_experts: (T, K) integers; anything outside [0, E) is an empty slot; the same expert
            may fill several slots of a token.
        routing_weights: (T, K), any floating dtype; read as float32 (float64 for float64 x).
        gate_up_bias: (E, 2I) or (E, I), the dtype of x, or None.
        down_bias: (E, H), the dtype of x, or None.
        activation: Key of `moeroute_kernels.activations.ACTIVATIONS`.
        interleaved: Rows of gate_up alternate gate, up; otherwise all gates come first.
        alpha: Slope inside the sigmoid of "gpt_oss_glu"; no other activation reads it.
        limit: Clamp of "gpt_oss_glu" and "clamped_silu_glu"; no other activation reads it.

    Returns:
        (T, H) in the dtype of x (the autocast dtype under autocast).

    Raises:
        ValueError: an unknown activation, or shapes or dtypes that do not fit.
    """
    x, gate_up, down, gate_up_bias, down_bias = autocast_to_match(
        x, gate_up, down, gate_up_bias, down_bias
    )
    check_activation(gate_up, down, activation)
    check_shapes(x, gate_up, down, selected_experts, routing_weights)
    check_biases(gate_up, down, gate_up_bias, down_bias)
    require_one_dtype(
        "routed_mlp",
        x=x,
        gate_up=gate_up,
        down=down,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )
    routing_weights = routing_weights.to(torch.promote_types(x.dtype, torch.float32))
    inputs = (x, gate_up, down, routing_weights, gate_up_bias, down_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return routed_mlp_op(
        x,
        gate_up,
        down,
        selected_experts,
        routing_weights,
        gate_up_bias,
        down_bias,
        activation,
        interleaved,
        alpha,
        limit,
        keep,
    )[0]
