"""The activations of `moeroute_kernels.activations` on tiles, with their derivatives.

Tiles are float32. GATED, CLAMPED and SHIFT repeat the columns of the table of the same names.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def value_and_slope(gate, alpha, NAME: tl.constexpr):
    """The pointwise function f(gate) and its derivative."""
    if NAME == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    elif NAME == "swish":
        sigmoid = tl.sigmoid(alpha * gate)
        value = gate * sigmoid
        slope = sigmoid * (1 + alpha * gate * (1 - sigmoid))
    elif NAME == "gelu":
        normal = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        value = gate * normal
        slope = normal + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        bend = tanh(inner)
        value = 0.5 * gate * (1 + bend)
        inner_slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
        slope = 0.5 * (1 + bend) + 0.5 * gate * (1 - bend * bend) * inner_slope
    elif NAME == "relu":
        value = tl.maximum(gate, 0.0)
        slope = tl.where(gate > 0, 1.0, 0.0)
    elif NAME == "relu2":
        positive = tl.maximum(gate, 0.0)
        value = positive * positive
        slope = 2 * positive
    else:
        tl.static_assert(NAME == "sigmoid")
        value = tl.sigmoid(gate)
        slope = value * (1 - value)
    return value, slope


@triton.jit
def activate(
    gate, up, alpha, limit, NAME: tl.constexpr, CLAMPED: tl.constexpr, SHIFT: tl.constexpr
):
    """value(gate) * (up + SHIFT)."""
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    value, _ = value_and_slope(gate, alpha, NAME)
    return value * (up + SHIFT)


@triton.jit
def activate_backward(
    gradient, gate, up, alpha, limit, NAME: tl.constexpr, CLAMPED: tl.constexpr, SHIFT: tl.constexpr
):
    """The activated tile, and the gradients of gate and up."""
    held_gate = gate
    held_up = up
    if CLAMPED:
        held_gate = tl.minimum(gate, limit)
        held_up = tl.minimum(tl.maximum(up, -limit), limit)
    value, slope = value_and_slope(held_gate, alpha, NAME)
    activated = value * (held_up + SHIFT)
    gate_gradient = gradient * (held_up + SHIFT) * slope
    up_gradient = gradient * value
    if CLAMPED:
        gate_gradient = tl.where(gate <= limit, gate_gradient, 0.0)
        up_gradient = tl.where(tl.abs(up) <= limit, up_gradient, 0.0)
    return activated, gate_gradient, up_gradient
