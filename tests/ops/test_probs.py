"""Logits to probabilities."""

import torch

from moeroute.ops.probs import normalized_sqrt_softplus_probs, sqrt_softplus_probs


def test_sqrt_softplus_has_a_finite_gradient_down_to_zero():
    logits = torch.tensor([[-200.0, -20.0, 0.0, 30.0]], requires_grad=True)
    probs = sqrt_softplus_probs(logits)
    torch.testing.assert_close(probs, torch.nn.functional.softplus(logits).sqrt())
    assert probs[0, 0] == 0
    probs.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] == 0


def test_normalised_rows_sum_to_one():
    probs = normalized_sqrt_softplus_probs(torch.randn(5, 4))
    torch.testing.assert_close(probs.sum(-1), torch.ones(5))
