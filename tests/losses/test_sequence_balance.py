"""Balance within samples, and over more than one forward."""

import pytest
import torch
from contracts.loss_cases import record
from torch import nn

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.losses import BalanceLoss, GlobalBalanceLoss, SequenceBalanceLoss
from moeroute.routers import ComposedRouter, LinearScore, RunningLoad, TopK

SURE = 20.0


def test_it_is_deepseeks_sum():
    logits = torch.randn(24, 6, dtype=torch.float64)
    scores = torch.sigmoid(logits).reshape(4, 6, 6)
    probs = scores / scores.sum(-1, keepdim=True)
    total = 0.0
    for sample in range(4):
        counts = torch.zeros(6, dtype=torch.float64)
        for token in range(6):
            for expert in scores[sample, token].topk(2).indices:
                counts[expert] += 1
        total += (6 / (2 * 6) * counts * probs[sample].mean(0)).sum()
    torch.testing.assert_close(SequenceBalanceLoss()(record(logits)), total / 4)


def test_samples_that_each_use_two_experts_are_even_together_but_not_alone():
    chosen = torch.arange(4).repeat_interleave(6) % 3  # a pair of experts a sample
    logits = torch.zeros(24, 6)
    for pair in range(2):
        logits[torch.arange(24), 2 * chosen + pair] = SURE
    known = record(logits[:18].repeat(2, 1)[:24])
    alone = SequenceBalanceLoss(probs=lambda z: torch.softmax(z, -1))(known)
    assert alone.item() == pytest.approx(3.0, abs=1e-3)  # E / K
    assert BalanceLoss()(known) < 1.2


def test_the_selection_bias_has_no_say():
    logits = torch.randn(24, 6)
    other = record(logits, select=lambda z: TopK(2)(-z))
    assert torch.equal(SequenceBalanceLoss()(other), SequenceBalanceLoss()(record(logits)))


class TestRunningLoad:
    def model(self):
        router = ComposedRouter(LinearScore(4, 4), RunningLoad(TopK(1, normalize=False)))
        with torch.no_grad():
            router.score.weight.copy_(SURE * torch.eye(4))
        layer = MoELayer(
            router=router, experts=SwiGLUExperts(4, 4, 4), losses=(GlobalBalanceLoss(),)
        )
        return moeroute.connect_layers(nn.Sequential(layer)).train()

    def loss(self, model, rows):
        model(rows)
        return moeroute.aux_losses(model).parts["GlobalBalanceLoss"].item()

    def test_micro_batches_count_together_until_the_step(self):
        model, tokens = self.model(), torch.eye(4)
        assert self.loss(model, tokens[:2]) == pytest.approx(2.0, abs=1e-3)
        assert self.loss(model, tokens[2:]) == pytest.approx(1.0, abs=1e-3)
        moeroute.post_step(model)
        assert self.loss(model, tokens[2:]) == pytest.approx(2.0, abs=1e-3)

    def test_without_earlier_batches_it_is_the_balance_loss(self):
        known = record(torch.randn(24, 6))
        assert torch.equal(GlobalBalanceLoss()(known), BalanceLoss()(known))

    def test_evaluation_counts_nothing(self):
        model = self.model().eval()
        model(torch.eye(4))
        assert model[0].router.select.counts_of_step is None
