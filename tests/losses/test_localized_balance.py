import pytest
import torch

from moeroute.losses.localized_balance import LocalizedBalanceLoss
from moeroute.types import RouterOutput, RoutingRecord

SAMPLES, LENGTH, EXPERTS = 3, 4, 6
TYPES = torch.tensor([1, 0, 1])


def record(weights, types=TYPES, mask=None):
    """weights: (B, S, E)."""
    shape, size = weights.shape[:2], weights.shape[2]
    flat = weights.flatten(0, 1)
    routing = RouterOutput(
        router_logits=torch.zeros_like(flat.detach()),
        routing_weights=flat,
        selected_experts=torch.arange(size).expand(flat.shape),
    )
    return RoutingRecord(
        site="",
        layer_index=0,
        routing=routing,
        token_mask=None if mask is None else mask.flatten(),
        sequence_shape=(shape[0], shape[1]),
        task_ids=types,
    )


def random_weights():
    return torch.randn(SAMPLES, LENGTH, EXPERTS, dtype=torch.double).softmax(-1)


def factors(delta):
    rows = []
    for kind in TYPES.tolist():
        own = (0, 1, 2) if kind == 1 else (3, 4, 5)
        rows.append([1 + delta if expert in own else 1 - delta for expert in range(EXPERTS)])
    return torch.tensor(rows, dtype=torch.double)


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5])
def test_equals_the_equation(delta):
    weights = random_weights().requires_grad_()
    values = weights.mean(1) * factors(delta)
    expected = values.var() / (values.mean() ** 2 + 1e-10)
    loss = LocalizedBalanceLoss(delta=delta)
    torch.testing.assert_close(loss(record(weights)), expected)
    (gradient,) = torch.autograd.grad(loss(record(weights)), weights)
    (by_hand,) = torch.autograd.grad(expected, weights)
    torch.testing.assert_close(gradient, by_hand)
    assert gradient.abs().sum() > 0


def test_zero_where_the_weighted_importances_are_equal():
    even = (1 / factors(0.2)).unsqueeze(1).expand(-1, LENGTH, -1)
    even = even / even.sum(-1, keepdim=True)
    assert LocalizedBalanceLoss(delta=0.2)(record(even)).item() == pytest.approx(0.0, abs=1e-12)
    assert LocalizedBalanceLoss(delta=0.2)(record(even, 1 - TYPES)) > 0.1
    flat = torch.full((SAMPLES, LENGTH, EXPERTS), 1 / EXPERTS)
    assert LocalizedBalanceLoss(delta=0.0)(record(flat, None)).item() == pytest.approx(0.0)


def test_order_of_samples_does_not_matter_if_types_go_along():
    weights, order = random_weights(), torch.tensor([1, 2, 0])
    loss = LocalizedBalanceLoss()
    torch.testing.assert_close(loss(record(weights[order], TYPES[order])), loss(record(weights)))
    assert loss(record(weights[order])) != loss(record(weights))


def test_padding_and_empty_samples_do_not_matter_even_if_they_are_nan():
    weights = random_weights()
    padded = torch.full((SAMPLES + 1, LENGTH + 2, EXPERTS), float("nan"), dtype=torch.double)
    padded[:SAMPLES, 2:] = weights
    mask = torch.zeros(SAMPLES + 1, LENGTH + 2, dtype=torch.bool)
    mask[:SAMPLES, 2:] = True
    padded.requires_grad_()
    loss = LocalizedBalanceLoss()
    value = loss(record(padded, torch.tensor([1, 0, 1, 0]), mask))
    torch.testing.assert_close(value, loss(record(weights)))
    value.backward()
    assert torch.count_nonzero(padded.grad[~mask]) == 0


def test_a_samples_length_does_not_matter():
    weights = random_weights()
    longer = weights.repeat(1, 3, 1)
    loss = LocalizedBalanceLoss()
    torch.testing.assert_close(loss(record(longer)), loss(record(weights)))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_tokens_cost_nothing(shape):
    weights = torch.zeros(*shape, EXPERTS, requires_grad=True)
    loss = LocalizedBalanceLoss()(record(weights, torch.zeros(shape[0], dtype=torch.int64)))
    loss.backward()
    assert loss.item() == 0


def test_types_are_needed_and_are_zero_or_one():
    weights = random_weights()
    with pytest.raises(ValueError, match=r"needs task_ids.*but got none"):
        LocalizedBalanceLoss()(record(weights, None))
    with pytest.raises(ValueError, match=r"one for each of 3 samples.*but got \(2,\)"):
        LocalizedBalanceLoss()(record(weights, TYPES[:2]))
    with pytest.raises(ValueError, match=r"task_ids are in 0..2"):
        LocalizedBalanceLoss()(record(weights, torch.tensor([0, 2, 1])))
    assert LocalizedBalanceLoss(delta=0.0)(record(weights, None)) > 0
