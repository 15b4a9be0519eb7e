"""BlockFFN's two losses, the controller of one, and what they are measured by."""

import math

import pytest
import torch
from contracts.loss_cases import EXPERTS, LENGTH, TOKENS, record
from torch import nn
from torch.nn import functional

import moeroute
from moeroute.layers import MLPExperts, MoELayer
from moeroute.losses import ChunkSparsityLoss, LocalityLoss, chunk_sparsity
from moeroute.methods import BlockFFN
from moeroute.ops.chunks import chunk_activation
from moeroute.routers import ChunkControl, Positive

NOBODY = EXPERTS


def locality(logits, real):
    """The definition, over pairs of one sample."""
    values = []
    for sample in range(len(logits)):
        for t in range(logits.shape[1] - 1):
            if real[sample, t] and real[sample, t + 1]:
                soft = torch.sigmoid(100 * logits[sample, t + 1])
                each = -(
                    soft * functional.logsigmoid(100 * logits[sample, t])
                    + (1 - soft) * functional.logsigmoid(-100 * logits[sample, t])
                )
                values.append(each.mean())
    return torch.stack(values).mean()


def chance(logits, real, size):
    """The definition, chunk by chunk."""
    values = []
    for sample in range(len(logits)):
        for begin in range(0, logits.shape[1], size):
            rows = [
                functional.relu(row)
                for row, there in zip(
                    logits[sample, begin : begin + size],
                    real[sample, begin : begin + size],
                    strict=True,
                )
                if there
            ]
            if rows:
                shares = torch.stack([row / row.sum().clamp(min=1e-9) for row in rows])
                values.append((1 - (1 - shares).prod(0)).mean())
    return torch.stack(values).mean()


@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_both_are_their_definitions(size):
    logits, mask = torch.randn(TOKENS, EXPERTS), torch.rand(TOKENS) > 0.3
    known = record(logits, mask)
    shaped, real = logits.reshape(-1, LENGTH, EXPERTS), mask.reshape(-1, LENGTH)
    found = ChunkSparsityLoss(chunk_size=size)(known)
    torch.testing.assert_close(found, chance(shaped, real, size), atol=2e-3, rtol=0)
    torch.testing.assert_close(LocalityLoss()(known), locality(shaped, real))


def test_known_values():
    one = torch.zeros(64, 40)
    one[:, 0] = 1.0
    assert chunk_activation(one, None, (1, 64), 64).item() == pytest.approx(1 / 40, abs=2e-3)
    none = chunk_activation(-one, None, (1, 64), 64).item()
    assert none == pytest.approx(-64e-5, rel=0.02)
    same = record(torch.ones(TOKENS, EXPERTS))
    assert LocalityLoss()(same).item() < 1e-6
    opposite = torch.ones(TOKENS, EXPERTS)
    opposite[::2] = -1.0
    assert LocalityLoss()(record(opposite)).item() == pytest.approx(100.0)
    assert LocalityLoss()(record(0 * opposite)).item() == pytest.approx(math.log(2))


def test_sparsity_of_tokens_and_of_chunks():
    ids = torch.tensor([[0, NOBODY], [0, 1], [2, 3], [2, NOBODY]])
    tokens = chunk_sparsity(ids, EXPERTS, (1, 4), 1)
    assert tokens.item() == pytest.approx(1 - 6 / 4 / EXPERTS)
    assert chunk_sparsity(ids, EXPERTS, (1, 4), 2).item() == pytest.approx(1 - 2 / EXPERTS)
    assert chunk_sparsity(ids, EXPERTS, (1, 4), 4).item() == pytest.approx(1 - 4 / EXPERTS)
    assert chunk_sparsity(ids, EXPERTS, (1, 4), 3).item() == pytest.approx(1 - 4 / EXPERTS)
    assert chunk_sparsity(ids, EXPERTS, (1, 4), 8).isnan()
    mask = torch.tensor([True, True, True, False])
    assert chunk_sparsity(ids, EXPERTS, (1, 4), 2, mask).item() == pytest.approx(1 - 2 / EXPERTS)


class Controller:
    """The schedule in plain numbers."""

    def __init__(self, first, hold, period, least_growth=1.025, cap=4.0):
        self.first = self.start = self.end = first
        self.hold, self.period, self.least_growth, self.cap = hold, period, least_growth, cap
        self.steps = self.position = 0
        self.before, self.now = [], []

    def value(self):
        return self.start + (self.end - self.start) * min(1.0, self.position / self.period)

    def step(self, loss):
        self.steps, self.position = self.steps + 1, self.position + 1
        self.now.append(loss)
        if self.steps % self.period == 0:
            if self.steps >= self.hold and self.before:
                value = self.value()
                growth = sum(self.now) / len(self.now) / (sum(self.before) / len(self.before))
                growth = max(growth, self.least_growth) if growth > 1 else growth
                self.start, self.position = value, 0
                self.end = min(value * growth, self.cap * self.first)
            self.before, self.now = self.now, []
        return self.value()


def feed(control, loss):
    """One optimizer step whose forwards had a mean loss."""
    control._seen = torch.tensor([2 * loss, 2.0])
    control.post_step()
    return control.chunk_coefficient.item()


@pytest.mark.parametrize("curve", [lambda i: 1.005**i, lambda i: 1 / (1 + 0.01 * i)])
def test_the_coefficient_follows_the_schedule(curve):
    control = ChunkControl(Positive(), hold=60, period=20)
    plain = Controller(5e-2, 60, 20)
    found, expected = zip(
        *((feed(control, curve(i)), plain.step(curve(i))) for i in range(400)), strict=True
    )
    assert found == pytest.approx(expected, rel=1e-3)
    assert max(found) <= 4 * 5e-2 + 1e-6
    assert found[50] == pytest.approx(5e-2)
    assert abs(found[-1] - 5e-2) > 1e-2


def test_a_saved_schedule_goes_on_as_if_nothing_had_happened():
    one = ChunkControl(Positive(), hold=4, period=4)
    for i in range(11):
        feed(one, 1 / (i + 1))
    other = ChunkControl(Positive(), hold=4, period=4)
    other.load_state_dict(one.state_dict())
    other.to(torch.bfloat16)
    assert [feed(one, 0.1) for _ in range(9)] == [feed(other, 0.1) for _ in range(9)]


def test_steps_without_tokens_do_not_count():
    control = ChunkControl(Positive(), hold=1, period=1)
    control.post_step()
    assert control.steps == 0
    assert control.chunk_coefficient.item() == pytest.approx(5e-2)


def test_a_layer_charges_both_and_steers_one():
    method = BlockFFN(chunk_size=4)
    layer = MoELayer(
        router=method.router(8, EXPERTS),
        experts=MLPExperts(EXPERTS, 8, 4, activation="silu"),
        losses=method.losses(),
    )
    model = moeroute.connect_layers(nn.Sequential(layer)).train()
    model(torch.randn(2, 12, 8))
    report = moeroute.aux_losses(model)
    assert set(report.parts) == {"LocalityLoss", "ChunkSparsityLoss"}
    report.total.backward()
    assert layer.router.score.weight.grad.abs().sum() > 0
    control = layer.router.select
    seen = control._seen.clone()
    assert report.parts["ChunkSparsityLoss"].item() == pytest.approx(0.05 * seen[0].item())
    moeroute.post_step(model)
    assert control.steps == 1
    assert BlockFFN(locality_loss_coef=0, chunk_loss_coef=0).losses() == ()
