"""LoRAMoE against its equation, and the types of samples that its balance loss knows."""

import pytest
import torch
from methods.beside import (
    WIDTH,
    assert_same_with_gradients,
    awake,
    loop_over_experts,
    record_of,
    site_at,
)

import moeroute
from moeroute.methods import LoRAMoE
from moeroute.routing_pass import SampleInputs


def build(**fields):
    base, site = site_at()
    settings = {"r": 2, "lora_alpha": 3.0, "num_experts": 4, **fields}
    return base, awake(LoRAMoE(**settings).build(site, None))


def forward(mixture, base, x, types=None):
    mixture.routing_pass.begin(samples=SampleInputs(task_ids=types))
    mixture.train()(x, base)
    return moeroute.aux_losses(mixture)


def samples():
    return torch.randn(2, 3, WIDTH, dtype=torch.double)


def test_output_and_gradients_equal_the_equation():
    base, mixture = build()
    x = torch.randn(6, WIDTH, dtype=torch.double, requires_grad=True)
    reference = loop_over_experts(
        base, mixture, x, lambda token: torch.softmax(mixture.router.score.weight @ token, dim=0)
    )
    ours = mixture.eval()(x, base)
    assert_same_with_gradients(ours, reference, [x, *mixture.parameters()])


def test_one_expert_is_plain_lora():
    base, mixture = build(num_experts=1, delta=0.0)
    x, bank = samples(), mixture.bank
    expected = base(x) + bank.scaling * x @ bank.lora_a.T @ bank.lora_b.T
    torch.testing.assert_close(mixture(x, base), expected)


def test_the_loss_is_on_by_default_and_reaches_the_router():
    """The released scripts leave it off."""
    base, mixture = build()
    report = forward(mixture, base, samples(), torch.tensor([0, 1]))
    assert report.parts["LocalizedBalanceLoss"] > 0
    torch.testing.assert_close(report.total, 0.1 * report.parts["LocalizedBalanceLoss"])
    (gradient,) = torch.autograd.grad(report.total, mixture.router.score.weight)
    assert gradient.abs().sum() > 0


def test_the_loss_moves_the_two_types_apart_by_delta():
    """At its minimum a sample uses its own group (1 - delta) / (1 + delta) times as much."""
    base, mixture = build(delta=0.3, router_aux_loss_coef=1.0)
    types = torch.tensor([1, 0])
    x = torch.zeros(2, 3, WIDTH, dtype=torch.double)
    x[0, :, 0] = x[1, :, 1] = 1.0
    optimizer = torch.optim.Adam(mixture.router.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        forward(mixture, base, x, types).total.backward()
        optimizer.step()
    weights = record_of(mixture.eval(), base, x).routing.routing_weights[[0, 3]]
    halves = weights.unflatten(1, (2, 2)).sum(2)
    assert (halves[0, 0] / halves[0, 1]).item() == pytest.approx(0.7 / 1.3, rel=0.02)
    assert (halves[1, 1] / halves[1, 0]).item() == pytest.approx(0.7 / 1.3, rel=0.02)


def test_only_training_with_groups_needs_types():
    base, mixture = build()
    mixture.routing_pass.begin()
    mixture.eval()(samples(), base)
    with pytest.raises(ValueError, match="needs task_ids"):
        forward(mixture, base, samples())
    base, mixture = build(delta=0.0)
    assert forward(mixture, base, samples()).total > 0
    _, mixture = build(router_aux_loss_coef=0.0)
    assert mixture.losses == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 5}, "num_experts=5 cannot be cut into two groups"),
        ({"delta": 1.0}, "delta=1.0 is outside"),
        ({"delta": -0.1}, "delta=-0.1 is outside"),
        ({"router_aux_loss_coef": -0.1}, "would reward imbalance"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRAMoE(**fields)
