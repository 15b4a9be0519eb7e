from dataclasses import dataclass

import pytest
import torch

from moeroute.losses import BalanceLoss, LossReport, ZLoss, total_loss
from moeroute.routers import TopK
from moeroute.types import RouterOutput, RoutingRecord


def record(*losses, scale=1.0, logits=None):
    logits = torch.randn(10, 4) * scale if logits is None else logits
    selection = TopK(2)(logits)
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=selection.routing_weights,
        selected_experts=selection.selected_experts,
    )
    return RoutingRecord(site="", layer_index=0, routing=routing, losses=losses)


def test_mean_over_layers_and_sum_over_losses():
    balance, z = BalanceLoss(weight=0.5), ZLoss(weight=0.25)
    records = [record(balance, z), record(balance, scale=3.0), record(z, scale=2.0), record()]
    report = total_loss(records)
    expected_balance = (balance(records[0]) + balance(records[1])) / 2
    expected_z = (z(records[0]) + z(records[2])) / 2
    assert list(report.parts) == ["BalanceLoss", "ZLoss"]
    torch.testing.assert_close(report.parts["BalanceLoss"], expected_balance)
    torch.testing.assert_close(report.parts["ZLoss"], expected_z)
    torch.testing.assert_close(report.total, 0.5 * expected_balance + 0.25 * expected_z)


def test_the_coefficient_does_not_grow_with_the_number_of_layers():
    layer = record(ZLoss())
    torch.testing.assert_close(total_loss([layer] * 7).total, total_loss([layer]).total)


def test_equal_losses_are_one_and_different_ones_are_named_apart():
    records = [record(ZLoss(weight=0.1)), record(ZLoss(weight=0.1)), record(ZLoss(weight=0.2))]
    report = total_loss(records)
    assert list(report.parts) == ["ZLoss", "ZLoss_2"]
    expected = 0.1 * report.parts["ZLoss"] + 0.2 * report.parts["ZLoss_2"]
    torch.testing.assert_close(report.total, expected)


def test_nothing_asked_for():
    for records in ([], [record()]):
        report = total_loss(records)
        assert isinstance(report, LossReport)
        assert report.total.item() == 0
        assert report.parts == {}


def test_gradient_reaches_the_logits_of_every_layer():
    layers = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]
    total_loss(record(BalanceLoss(), logits=logits) for logits in layers).total.backward()
    assert all(logits.grad.abs().sum() > 0 for logits in layers)


@dataclass(frozen=True)
class Gap:
    """How far the mean over layers is from a target."""

    target: float
    weight: float = 3.0

    def __call__(self, record):
        return self.over([record])

    def over(self, records):
        means = torch.stack([record.routing.router_logits.mean() for record in records])
        return (means.mean() - self.target).abs()


def test_a_loss_of_all_layers_is_asked_once_about_those_that_ask_for_it():
    logits = [torch.full((5, 4), value, requires_grad=True) for value in (1.0, 3.0, 50.0)]
    records = [record(Gap(0.5), logits=each) for each in logits[:2]]
    report = total_loss([*records, record(BalanceLoss(weight=0.0), logits=logits[2])])
    assert report.parts["Gap"].item() == 1.5
    assert report.total.item() == 4.5
    apart = total_loss([record(Gap(2.0), logits=each) for each in logits[:2]])
    assert apart.parts["Gap"].item() == 0.0  # the mean of the gaps would be 1
    report.total.backward()
    assert all(each.grad.abs().sum() > 0 for each in logits[:2])


class Unhashable:
    weight = 2.0

    def __eq__(self, other):
        return isinstance(other, Unhashable)

    def __call__(self, record):
        return record.routing.router_logits.sum()


def test_losses_need_not_be_hashable():
    records = [record(Unhashable()), record(Unhashable())]
    expected = sum(one.routing.router_logits.sum() for one in records)
    report = total_loss(records)
    assert list(report.parts) == ["Unhashable"]
    assert report.total.item() == pytest.approx(expected.item(), rel=1e-5)
