import math

import pytest
import torch

from moeroute.ops.entropy import tsallis_entropy


def test_between_zero_and_one_but_for_eps_and_highest_at_even():
    probs = (4 * torch.randn(500, 8, dtype=torch.double)).softmax(-1)
    entropy = tsallis_entropy(probs, index=1.1)
    even = tsallis_entropy(torch.full((8,), 0.125, dtype=torch.double), index=1.1)
    assert entropy.min() > -6e-4
    assert entropy.max() <= even < 1
    order = torch.randperm(8)
    torch.testing.assert_close(tsallis_entropy(probs[:, order], index=1.1), entropy)


def test_known_values():
    def entropy(row):
        return tsallis_entropy(torch.tensor(row, dtype=torch.double), index=1.1).item()

    assert entropy([0.125] * 8) == pytest.approx(0.9996, abs=5e-5)
    assert entropy([0.5, 0.5] + [0.0] * 6) == pytest.approx(0.356, abs=1e-3)
    assert entropy([1.0] + [0.0] * 3) < 0


@pytest.mark.parametrize("index", [0.98, 0.991, 1.0, 1.0001, 1.02])
def test_close_to_shannon_near_one(index):
    probs = torch.randn(50, 6, dtype=torch.double).softmax(-1)
    shannon = -(probs * probs.log()).sum(-1) / math.log(6)
    tolerance = 1e-3 if abs(index - 1) < 0.01 else 2e-2
    close = tsallis_entropy(probs, index=index)
    torch.testing.assert_close(close, shannon, rtol=0, atol=tolerance)


def test_one_expert_has_none_and_gradients_are_finite_at_zero():
    assert torch.equal(tsallis_entropy(torch.ones(3, 1), index=1.1), torch.zeros(3))
    probs = torch.tensor([1.0, 0.0], requires_grad=True)
    for index in (0.5, 1.0, 1.1, 2.0):
        (gradient,) = torch.autograd.grad(tsallis_entropy(probs, index=index), probs)
        assert gradient.isfinite().all()
