"""Kronecker products that are never made, against those that are."""

import pytest
import torch

from moeroute.ops.kronecker import MANY_TOKENS, gated_kronecker


@pytest.mark.parametrize("tokens", [0, 1, 5, MANY_TOKENS - 1, MANY_TOKENS, MANY_TOKENS + 9])
@pytest.mark.parametrize(("width", "out"), [(12, 24), (11, 7), (5, 13)])
def test_values_and_gradients_equal_the_matrices(tokens, width, out):
    sizes, counts, rank = (2, 3, 4), (2, 1, 3), 2
    x = torch.randn(tokens, width, dtype=torch.double, requires_grad=True)
    meta_a = torch.randn(rank, -(-width // 2), dtype=torch.double, requires_grad=True)
    meta_b = torch.randn(-(-out // 2), rank, dtype=torch.double, requires_grad=True)
    kernels, gates = [], []
    for size, count in zip(sizes, counts, strict=True):
        kernels.append(torch.randn(count, size, size, dtype=torch.double, requires_grad=True))
        gates.append(torch.rand(tokens, count, dtype=torch.double, requires_grad=True))
    ours = gated_kronecker(x, meta_a, meta_b, kernels, gates, out)
    made = torch.zeros(tokens, out, dtype=torch.double)
    for size, stack, own in zip(sizes, kernels, gates, strict=True):
        meta = meta_b[: -(-out // size)] @ meta_a[:, : -(-width // size)]
        for kernel, gate in zip(stack, own.T, strict=True):
            weight = torch.kron(meta, kernel)[:out, :width]
            made = made + gate.unsqueeze(1) * (x @ weight.T)
    torch.testing.assert_close(ours, made)
    inputs, upstream = [x, meta_a, meta_b, *kernels, *gates], torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(made, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)
