"""The activations of expert MLPs, each with its derivative: a table of parts.

A gated activation turns a gate and an up projection into one tensor, `value(gate) * (up + shift)`,
an ungated one is `value(gate)`. Every row of `ACTIVATIONS` names the pointwise function, its
derivative and what is done before it (clamping) and after it (the shift).

Shapes: gate, up, activated and all gradients are (N, I), any strides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Activation:
    """One row of the table.

    Attributes:
        value: (gate, alpha) -> f(gate), differentiable.
        slope: (gradient, gate, alpha) -> gradient * f'(gate).
        gated: Whether an up projection multiplies the value.
        clamped: Whether gate is held at or below limit and up within +-limit.
        shift: Added to up before the product.
    """

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, Tensor, float], Tensor]
    gated: bool = True
    clamped: bool = False
    shift: float = 0.0


def _silu(gate: Tensor, alpha: float) -> Tensor:
    return F.silu(gate)


def _silu_slope(gradient: Tensor, gate: Tensor, alpha: float) -> Tensor:
    return _aten.silu_backward(gradient, gate)


def _swish(gate: Tensor, alpha: float) -> Tensor:
    return gate * torch.sigmoid(alpha * gate)


def _swish_slope(gradient: Tensor, gate: Tensor, alpha: float) -> Tensor:
    sigmoid = torch.sigmoid(alpha * gate)
    return gradient * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))


def _gelu(gate: Tensor, alpha: float) -> Tensor:
    return F.gelu(gate)


def _gelu_slope(gradient: Tensor, gate: Tensor, alpha: float) -> Tensor:
    return _aten.gelu_backward(gradient, gate)


def _gelu_tanh(gate: Tensor, alpha: float) -> Tensor:
    return F.gelu(gate, approximate="tanh")


def _gelu_tanh_slope(gradient: Tensor, gate: Tensor, alpha: float) -> Tensor:
    return _aten.gelu_backward(gradient, gate, approximate="tanh")


def _relu(gate: Tensor, alpha: float) -> Tensor:
    return F.relu(gate)


def _relu_slope(gradient: Tensor, gate: Tensor, alpha: float) -> Tensor:
    return _aten.threshold_backward(gradient, gate, 0)


def _relu2(gate: Tensor, alpha: float) -> Tensor:
    return F.relu(gate).square()


def _relu2_slope(gradient: Tensor, gate: Tensor, alpha: float) -> Tensor:
    return gradient * F.relu(gate) * 2.0


def _sigmoid(gate: Tensor, alpha: float) -> Tensor:
    return torch.sigmoid(gate)


def _sigmoid_slope(gradient: Tensor, gate: Tensor, alpha: float) -> Tensor:
    return _aten.sigmoid_backward(gradient, torch.sigmoid(gate))


ACTIVATIONS: Mapping[str, Activation] = {
    "silu_glu": Activation(_silu, _silu_slope),
    "gelu_glu": Activation(_gelu, _gelu_slope),
    "gelu_tanh_glu": Activation(_gelu_tanh, _gelu_tanh_slope),
    "relu_glu": Activation(_relu, _relu_slope),
    "sigmoid_glu": Activation(_sigmoid, _sigmoid_slope),
    "clamped_silu_glu": Activation(_silu, _silu_slope, clamped=True),
    "gpt_oss_glu": Activation(_swish, _swish_slope, clamped=True, shift=1.0),
    "silu": Activation(_silu, _silu_slope, gated=False),
    "gelu": Activation(_gelu, _gelu_slope, gated=False),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_slope, gated=False),
    "relu": Activation(_relu, _relu_slope, gated=False),
    "relu2": Activation(_relu2, _relu2_slope, gated=False),
}


def split_pre_activation(
    pre: Tensor, name: str, *, interleaved: bool = False
) -> tuple[Tensor, Tensor | None]:
    """View the gate and up parts of a pre-activation.

    Args:
        pre: (N, 2I) for a gated activation, (N, I) otherwise.
        name: Key of `ACTIVATIONS`.
        interleaved: Columns alternate gate, up, gate, up; otherwise all gates come first.

    Returns:
        Views (gate, up), each (N, I); up is None for an ungated activation.
    """
    if not ACTIVATIONS[name].gated:
        return pre, None
    if interleaved:
        return pre[:, 0::2], pre[:, 1::2]
    half = pre.shape[1] // 2
    return pre[:, :half], pre[:, half:]


def activate(
    gate: Tensor, up: Tensor | None, name: str, *, alpha: float = 1.702, limit: float = float("inf")
) -> Tensor:
    """Apply an activation; plain differentiable torch, the definition.

    Args:
        gate: (N, I).
        up: (N, I), or None for an ungated activation.
        name: Key of `ACTIVATIONS`.
        alpha: Slope inside the sigmoid of "gpt_oss_glu"; no other activation reads it.
        limit: Clamp of the clamped activations; no other activation reads it.

    Returns:
        (N, I) in the dtype of gate.
    """
    row = ACTIVATIONS[name]
    if up is None:
        return row.value(gate, alpha)
    if row.clamped:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return row.value(gate, alpha) * (up + row.shift if row.shift else up)


def activate_backward(
    gradient: Tensor,
    gate: Tensor,
    up: Tensor | None,
    name: str,
    *,
    alpha: float = 1.702,
    limit: float = float("inf"),
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `activate`.

    Args:
        gradient: (N, I), of the activated tensor.
        gate: (N, I), as given to `activate`.
        up: (N, I) or None, as given to `activate`.
        name: Key of `ACTIVATIONS`.
        alpha: As given to `activate`.
        limit: As given to `activate`.

    Returns:
        Gradients of gate and up, each (N, I); the latter is None for an ungated activation.
    """
    row = ACTIVATIONS[name]
    if up is None:
        return row.slope(gradient, gate, alpha), None
    if not row.clamped:
        shifted = up + row.shift if row.shift else up
        return row.slope(gradient * shifted, gate, alpha), gradient * row.value(gate, alpha)
    held_gate, held_up = gate.clamp(max=limit), up.clamp(-limit, limit)
    gate_gradient = row.slope(gradient * (held_up + row.shift), held_gate, alpha)
    up_gradient = gradient * row.value(held_gate, alpha)
    return gate_gradient * (gate <= limit), up_gradient * (up.abs() <= limit)
