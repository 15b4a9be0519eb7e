"""Every activation: its derivative is autograd's, and it says what Hugging Face's models say."""

import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F

from moeroute_kernels.activations import (
    ACTIVATIONS,
    activate,
    activate_backward,
    split_pre_activation,
)

OPTIONS = {"alpha": 1.3, "limit": 0.8}


def parts(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    gate = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    up = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    return gate, up if ACTIVATIONS[name].gated else None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_the_derivative(name: str):
    gate, up = parts(name)
    gradient = torch.randn(20, 6, dtype=torch.float64)
    inputs = [gate] if up is None else [gate, up]
    expected = torch.autograd.grad(activate(gate, up, name, **OPTIONS), inputs, gradient)
    seen = activate_backward(gradient, gate, up, name, **OPTIONS)
    assert (seen[1] is None) == (up is None)
    for a, b in zip(seen, expected, strict=False):
        assert a is not None
        assert_close("activation", a, b)


@pytest.mark.parametrize("name", ["clamped_silu_glu", "gpt_oss_glu"])
def test_the_gradient_at_a_bound_is_that_of_torch_clamp(name: str):
    gate = torch.tensor([[0.8, 0.9, -3.0]], dtype=torch.float64, requires_grad=True)
    up = torch.tensor([[0.8, -0.8, -0.9]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 3, dtype=torch.float64)
    expected = torch.autograd.grad(activate(gate, up, name, **OPTIONS), [gate, up], ones)
    for a, b in zip(activate_backward(ones, gate, up, name, **OPTIONS), expected, strict=True):
        assert a is not None
        assert_close("activation", a, b)


HAND_WRITTEN = {
    "silu_glu": lambda g, u: F.silu(g) * u,
    "gelu_glu": lambda g, u: F.gelu(g) * u,
    "gelu_tanh_glu": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "relu_glu": lambda g, u: g.clamp(min=0) * u,
    "sigmoid_glu": lambda g, u: u / (1 + torch.exp(-g)),
    "clamped_silu_glu": lambda g, u: F.silu(g.clamp(max=0.8)) * u.clamp(-0.8, 0.8),
    "gpt_oss_glu": lambda g, u: (
        g.clamp(max=0.8) * torch.sigmoid(1.3 * g.clamp(max=0.8)) * (u.clamp(-0.8, 0.8) + 1)
    ),
    "silu": lambda g, u: F.silu(g),
    "gelu": lambda g, u: F.gelu(g),
    "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh"),
    "relu": lambda g, u: g.clamp(min=0),
    "relu2": lambda g, u: g.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value(name: str):
    gate, up = parts(name)
    assert_close("activation", activate(gate, up, name, **OPTIONS), HAND_WRITTEN[name](gate, up))


def test_split():
    pre = torch.arange(6.0).view(1, 6)
    gate, up = split_pre_activation(pre, "silu_glu")
    assert gate.tolist() == [[0, 1, 2]]
    assert up is not None
    assert up.tolist() == [[3, 4, 5]]
    gate, up = split_pre_activation(pre, "silu_glu", interleaved=True)
    assert gate.tolist() == [[0, 2, 4]]
    assert up is not None
    assert up.tolist() == [[1, 3, 5]]
    gate, up = split_pre_activation(pre, "relu2")
    assert gate is pre
    assert up is None
