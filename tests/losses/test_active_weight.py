"""ReMoE's L1 and the coefficient that steers it."""

import copy

import pytest
import torch

from moeroute.losses import ActiveWeightLoss
from moeroute.routers import ComposedRouter, DensityControl, LinearScore, Positive, TopK
from moeroute.types import RouterInput, RoutingRecord

EXPERTS, TOKENS, SLOTS = 8, 12, 2


def make(bias=0.0, **settings):
    torch.manual_seed(0)
    score = LinearScore(5, EXPERTS, bias=True, init_std=1.0)
    with torch.no_grad():
        score.bias.fill_(bias)
    return ComposedRouter(score, DensityControl(Positive(), SLOTS, **settings))


def record(router, tokens, mask=None):
    shape = (1, tokens.shape[0])
    given = RouterInput(hidden_states=tokens, sequence_shape=shape, token_mask=mask)
    routing = router(given)
    return RoutingRecord(
        site="here", layer_index=0, routing=routing, token_mask=mask, router=router
    )


def test_the_loss_is_the_papers():
    router, tokens = make(coefficient=0.5), torch.randn(TOKENS, 5)
    weights = torch.relu(router.score(RouterInput(hidden_states=tokens, sequence_shape=(1, 12))))
    counts = (weights > 0).sum(0)
    expected = 0.5 * EXPERTS / (SLOTS * TOKENS**2) * (weights.sum(0) * counts).sum()
    loss = ActiveWeightLoss()(record(router, tokens))
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, router.score.bias)
    assert (gradient > 0).all()


def test_padding_and_no_tokens():
    router, tokens = make(coefficient=0.5), torch.randn(TOKENS, 5)
    mask = torch.arange(TOKENS) < 7
    expected = ActiveWeightLoss()(record(router, tokens[:7]))
    tokens = tokens.masked_fill(~mask[:, None], float("nan"))
    torch.testing.assert_close(ActiveWeightLoss()(record(router, tokens, mask)), expected)
    assert ActiveWeightLoss()(record(router, tokens[:0])) == 0
    assert ActiveWeightLoss()(record(router, tokens, torch.zeros(TOKENS, dtype=torch.bool))) == 0


@pytest.mark.parametrize(("bias", "factor"), [(9.0, 1.2), (-9.0, 1 / 1.2)])
def test_the_coefficient_moves_once_a_step(bias, factor):
    router = make(bias)
    for _ in range(3):
        router.select.observe(record(router, torch.randn(TOKENS, 5)))
    router.select.post_step()
    torch.testing.assert_close(router.select.coefficient, torch.tensor(1e-8 * factor))
    router.select.post_step()  # nothing was seen
    torch.testing.assert_close(router.select.coefficient, torch.tensor(1e-8 * factor))
    loaded = make()
    loaded.load_state_dict(copy.deepcopy(router.state_dict()))
    assert torch.equal(loaded.select.coefficient, router.select.coefficient)
    assert router.half().select.coefficient > 0  # which float16 cannot hold


def test_padding_is_no_part_of_the_density():
    router = make(9.0)
    tokens = torch.cat([torch.randn(1, 5), torch.full((11, 5), -1e4)])
    router.select.observe(record(router, tokens, torch.arange(TOKENS) < 1))
    router.select.post_step()
    assert router.select.coefficient > 1e-8


def test_what_cannot_be():
    kept = record(ComposedRouter(LinearScore(5, 8), TopK(2)), torch.randn(3, 5))
    with pytest.raises(ValueError, match="here: ActiveWeightLoss needs a router that steers"):
        ActiveWeightLoss()(kept)
    with pytest.raises(ValueError, match="step=1.0"):
        DensityControl(Positive(), 2, step=1.0)
    with pytest.raises(ValueError, match="slots=9 exceeds the 8 experts"):
        ComposedRouter(LinearScore(5, 8), DensityControl(Positive(), 9))
