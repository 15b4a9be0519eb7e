"""RLOO: unbiased, and blind to what all copies share."""

from itertools import permutations

import pytest
import torch

from moeroute.losses import rloo_surrogate
from moeroute.losses.policy_gradient import NeedsCopies
from moeroute.ops.subsets import subset_log_prob
from moeroute.types import RouterOutput, RoutingRecord

DRAWS = torch.tensor(list(permutations(range(4), 2)))  # 12 ordered pairs


def test_the_mean_estimate_is_the_exact_gradient_by_enumeration():
    """n=4, k=2, M=2: all 144 pairs of draws, each weighted by its probability."""
    torch.manual_seed(0)
    logits = torch.randn(4, dtype=torch.double, requires_grad=True)
    losses = torch.randn(12, dtype=torch.double)
    log_probs = subset_log_prob(logits.expand(12, 4), DRAWS)
    probs = log_probs.exp()
    (exact,) = torch.autograd.grad((probs * losses).sum(), logits, retain_graph=True)
    mean = torch.zeros(4, dtype=torch.double)
    for first in range(12):
        for second in range(12):
            pair = [first, second]
            surrogate = rloo_surrogate(losses[pair], log_probs[pair])
            (estimate,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
            mean += (probs[first] * probs[second]).detach() * estimate
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(mean, exact)


def test_both_forms_of_the_estimator():
    losses, log_probs = torch.randn(5), torch.randn(5)
    others = (losses.sum() - losses) / 4
    torch.testing.assert_close(
        rloo_surrogate(losses, log_probs), ((losses - others) * log_probs).mean()
    )


def test_a_constant_changes_nothing_and_equal_losses_give_exactly_zero():
    log_probs = torch.randn(3, requires_grad=True)
    losses = torch.tensor([0.25, 1.5, -0.75])
    torch.testing.assert_close(
        rloo_surrogate(losses + 8.0, log_probs), rloo_surrogate(losses, log_probs)
    )
    for value in (0.1, 1 / 3, 7.7):
        (gradient,) = torch.autograd.grad(
            rloo_surrogate(torch.full((3,), value), log_probs), log_probs
        )
        assert torch.count_nonzero(gradient) == 0


def test_no_gradient_passes_to_the_losses_and_half_precision_is_widened():
    losses = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    surrogate = rloo_surrogate(losses, log_probs)
    assert surrogate.dtype == torch.float32
    surrogate.backward()
    assert losses.grad is None
    assert log_probs.grad.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("count", [0, 1])
def test_one_copy_has_no_baseline(count):
    with pytest.raises(ValueError, match=f"copies={count}: .* draw at least 2"):
        rloo_surrogate(torch.ones(count), torch.ones(count))


def test_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match="one number a copy"):
        rloo_surrogate(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="one number a copy"):
        rloo_surrogate(torch.ones(2, 1), torch.ones(2, 1))


def test_the_loss_that_stands_in_refuses():
    routing = RouterOutput(
        router_logits=torch.zeros(1, 2),
        routing_weights=torch.ones(1, 1),
        selected_experts=torch.zeros(1, 1, dtype=torch.int64),
    )
    record = RoutingRecord(site="layers.0.q_proj", layer_index=0, routing=routing)
    with pytest.raises(RuntimeError, match=r"layers\.0\.q_proj .* moeroute\.policy_gradient_loss"):
        NeedsCopies()(record)
