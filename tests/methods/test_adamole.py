"""AdaMoLE against its equation, and the threshold that each token sets."""

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
from methods.two_clusters import information_learned
from torch import nn

import moeroute
from moeroute.losses import BalanceLoss
from moeroute.losses.threshold_balance import ThresholdBalanceLoss
from moeroute.methods import AdaMoLE
from moeroute.routers import LinearScore
from moeroute.routers.threshold import ThresholdRouter
from moeroute.types import RoutingRecord


def build(**fields):
    base, site = site_at()
    settings = {"r": 2, "lora_alpha": 3.0, "num_experts": 4, **fields}
    return base, awake(AdaMoLE(**settings).build(site, None))


def tokens(count=8):
    return torch.randn(count, WIDTH, dtype=torch.double)


def set_threshold(mixture, logit):
    with torch.no_grad():
        mixture.router.threshold.weight.zero_()
        mixture.router.threshold.bias.fill_(logit)


@pytest.mark.parametrize("max_threshold", [None, 0.6])
def test_output_and_gradients_equal_the_equation(max_threshold):
    base, mixture = build(max_threshold=max_threshold)
    router = mixture.router

    def weights_of(token):
        probs = torch.softmax(router.score.weight @ token, dim=0)
        logit = router.threshold.weight[0] @ token + router.threshold.bias[0]
        kept = torch.relu(probs - (max_threshold or 0.25) * torch.sigmoid(logit))
        return kept / kept.sum() if kept.sum() > 0 else kept

    x = tokens(20).requires_grad_()
    reference = loop_over_experts(base, mixture, x, weights_of)
    assert_same_with_gradients(mixture(x, base), reference, [x, *mixture.parameters()])


def test_no_threshold_is_a_soft_mixture():
    base, mixture = build(max_threshold=0.0)
    routing = record_of(mixture, base, tokens()).routing
    torch.testing.assert_close(routing.routing_weights, routing.router_logits.softmax(-1))


def test_the_highest_threshold_keeps_exactly_the_experts_above_the_mean():
    base, mixture = build()
    set_threshold(mixture, 1e3)
    routing = record_of(mixture, base, tokens(50)).routing
    above = routing.router_logits.softmax(-1) > 0.25
    assert torch.equal(routing.routing_weights > 0, above)
    assert torch.equal(routing.selected_experts < 4, above)
    assert set(above.sum(1).tolist()) > {1}
    assert above.any(1).all()


def test_fewer_experts_the_higher_the_threshold():
    base, mixture = build()
    x, before = tokens(50), None
    for logit in (-1e3, -2.0, 0.0, 2.0, 1e3):
        set_threshold(mixture, logit)
        active = (record_of(mixture, base, x).routing.selected_experts < 4).sum(1)
        assert before is None or (active <= before).all()
        before = active


def test_weights_sum_to_one_or_to_nothing():
    base, mixture = build(max_threshold=1.0)
    set_threshold(mixture, 0.3)
    weights = record_of(mixture, base, tokens(60)).routing.routing_weights
    total = weights.sum(1)
    none = total == 0
    assert none.any()
    assert not none.all()
    torch.testing.assert_close(total[~none], torch.ones_like(total[~none]))


def test_equal_probabilities_under_a_saturated_threshold_leave_the_base():
    base, mixture = build()
    nn.init.zeros_(mixture.router.score.weight)
    set_threshold(mixture, 1e3)
    x = tokens().requires_grad_()
    out = mixture(x, base)
    assert torch.equal(out, base(x))
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixture.parameters())


def test_the_balance_loss_equals_its_equation():
    base, mixture = build()
    record = record_of(mixture.train(), base, tokens(12))
    (loss,) = mixture.losses
    assert loss.weight == 1e-3
    probs, taus = record.routing.router_logits.softmax(-1), record.routing.thresholds
    expected = 0.0
    for expert in range(4):
        kept = sum(float(p[expert] >= tau) for p, tau in zip(probs, taus, strict=True)) / 12
        distance = sum(p[expert] - tau for p, tau in zip(probs, taus, strict=True)) / 12
        expected = expected + 4 * kept * distance
    torch.testing.assert_close(loss(record), expected)


def test_the_balance_loss_reaches_gate_and_threshold_though_the_input_has_no_gradient():
    """The reference code keeps the loss only where the input requires one."""
    base, mixture = build()
    mixture.train()(tokens(), base)
    moeroute.aux_losses(mixture).total.backward()
    router = mixture.router
    for parameter in (router.score.weight, router.threshold.weight, router.threshold.bias):
        assert parameter.grad.abs().sum() > 0


def test_padding_changes_no_loss_even_if_it_is_nan():
    base, mixture = build()
    x = tokens(6)
    plain = record_of(mixture, base, x)
    dirty = torch.cat([x, torch.full((3, WIDTH), float("nan"), dtype=torch.double)])
    routing = record_of(mixture, base, dirty).routing
    record = RoutingRecord(site="", layer_index=0, routing=routing, token_mask=torch.arange(9) < 6)
    loss = ThresholdBalanceLoss()(record)
    torch.testing.assert_close(loss, ThresholdBalanceLoss()(plain))
    nothing = RoutingRecord(
        site="", layer_index=0, routing=routing, token_mask=torch.zeros(9, dtype=torch.bool)
    )
    assert ThresholdBalanceLoss()(nothing) == 0


def test_a_nan_token_shows():
    base, mixture = build()
    x = tokens(2)
    x[1] = float("nan")
    out = mixture(x, base)
    assert out[0].isfinite().all()
    routing = record_of(mixture, base, x).routing
    assert routing.routing_weights[1].isnan().all()
    assert torch.equal(routing.selected_experts[1], torch.arange(4))


def test_the_loss_needs_thresholds():
    base, site = site_at()
    other = moeroute.get_method("molora")(r=2).build(site, None).double()
    record = record_of(other, base, tokens())
    assert BalanceLoss()(record) > 0
    with pytest.raises(ValueError, match="has none; use BalanceLoss"):
        ThresholdBalanceLoss()(record)


def test_bad_fields():
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"max_threshold={value} is outside"):
            AdaMoLE(max_threshold=value)
        with pytest.raises(ValueError, match=rf"max_threshold={value} is outside"):
            ThresholdRouter(LinearScore(4, 3), LinearScore(4, 1), max_threshold=value)
    with pytest.raises(ValueError, match="gives 2 numbers a token"):
        ThresholdRouter(LinearScore(4, 3), LinearScore(4, 2), max_threshold=0.1)
    with pytest.raises(ValueError, match="would reward imbalance"):
        AdaMoLE(router_aux_loss_coef=-1.0)


def test_a_router_tells_two_clusters_apart():
    base, site = site_at()
    mixture = AdaMoLE(r=2, num_experts=2, router_aux_loss_coef=0.5).build(site, None)
    assert information_learned(base, mixture.double(), WIDTH, steps=600) > 0.9
