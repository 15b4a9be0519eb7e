"""Losses that sharpen routing: anchor, orthogonality, variance, Renyi entropy."""

import math

import pytest
import torch
from contracts.loss_cases import EXPERTS, TOKENS, Rich, RichExperts, record

from moeroute.losses import AnchorLoss, EntropyLoss, OrthogonalityLoss, RenyiLoss, VarianceLoss

SURE = 40.0


def sure_of(experts):
    """Logits that give each token one expert."""
    return SURE * torch.nn.functional.one_hot(experts, EXPERTS).float()


class TestAnchor:
    def test_zero_on_the_target_alone(self):
        known = record(sure_of(torch.full((TOKENS,), 2)))
        assert AnchorLoss(experts=(2,))(known).item() == pytest.approx(0.0, abs=1e-9)
        assert AnchorLoss(experts=(1,))(known).item() == pytest.approx(2.0)

    def test_even_probabilities(self):
        known = record(torch.zeros(TOKENS, EXPERTS))
        assert AnchorLoss(experts=(2,))(known).item() == pytest.approx(1 - 1 / EXPERTS)
        assert AnchorLoss(experts=(0, 1))(known).item() == pytest.approx(1 / 2 - 1 / EXPERTS)

    def test_the_gradient_raises_the_target(self):
        logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
        AnchorLoss(experts=(2,))(record(logits)).backward()
        assert (logits.grad[:, 2] < 0).all()

    @pytest.mark.parametrize("experts", [(), (-1,), (1, 1)])
    def test_targets_that_are_none(self, experts):
        with pytest.raises(ValueError, match="name distinct ids"):
            AnchorLoss(experts=experts)

    def test_a_target_that_the_layer_lacks(self):
        with pytest.raises(ValueError, match="ids go from 0 to 5"):
            AnchorLoss(experts=(6,))(record(torch.randn(TOKENS, EXPERTS)))


class TestOrthogonality:
    def test_is_the_mean_square_of_cosines(self):
        router = Rich()
        rows = torch.nn.init.normal_(router.score.weight)
        pairs = [
            torch.cosine_similarity(rows[e], rows[f], dim=0) ** 2
            for e in range(EXPERTS)
            for f in range(EXPERTS)
            if e != f
        ]
        known = record(torch.randn(TOKENS, EXPERTS), parts=(router, RichExperts()))
        torch.testing.assert_close(OrthogonalityLoss()(known), torch.stack(pairs).mean())

    def test_parallel_rows(self):
        router = Rich()
        with torch.no_grad():
            router.score.weight.copy_(torch.arange(1.0, EXPERTS + 1)[:, None].expand(-1, 8))
        known = record(torch.randn(TOKENS, EXPERTS), parts=(router, RichExperts()))
        assert OrthogonalityLoss()(known).item() == pytest.approx(1.0)


class TestVariance:
    def test_zero_where_sure_and_even(self):
        known = record(sure_of(torch.arange(TOKENS) % EXPERTS))
        assert VarianceLoss()(known).item() == pytest.approx(0.0, abs=1e-6)

    def test_one_where_all_tokens_are_alike(self):
        known = record(torch.randn(1, EXPERTS).expand(TOKENS, -1))
        assert VarianceLoss()(known).item() == pytest.approx(1.0, abs=1e-6)

    def test_descending_makes_tokens_differ(self):
        logits = (0.1 * torch.randn(TOKENS, EXPERTS)).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            VarianceLoss()(record(logits)).backward()
            optimizer.step()
        assert VarianceLoss()(record(logits)) < 0.2


class TestRenyi:
    @pytest.mark.parametrize("order", [0.5, 2.0, 5.0])
    def test_is_its_definition(self, order):
        logits = torch.randn(TOKENS, EXPERTS)
        probs = logits.softmax(-1)
        expected = probs.pow(order).sum(-1).log() / (1 - order) / math.log(EXPERTS)
        torch.testing.assert_close(RenyiLoss(order=order)(record(logits)), expected.mean())

    def test_order_one_is_shannons(self):
        known = record(torch.randn(TOKENS, EXPERTS))
        shannon = EntropyLoss(index=1.0, eps=0.0)(known)
        torch.testing.assert_close(RenyiLoss(order=1.0)(known), shannon)

    def test_higher_orders_are_smaller(self):
        known = record(torch.randn(TOKENS, EXPERTS))
        values = [RenyiLoss(order=order)(known).item() for order in (0.5, 1.0, 2.0, 4.0)]
        assert values == sorted(values, reverse=True)
        with pytest.raises(ValueError, match="order=0"):
            RenyiLoss(order=0)
