import pytest
import torch
from torch.nn import functional

from moeroute.routers import ComposedRouter, LinearScore, NoisyLinearScore, TopK
from moeroute.types import RouterInput

HIDDEN, EXPERTS = 6, 5


def given(tokens):
    return RouterInput(hidden_states=tokens, sequence_shape=(1, tokens.shape[0]))


def test_linear_score_is_a_linear():
    score = LinearScore(HIDDEN, EXPERTS, bias=True)
    with torch.no_grad():
        score.bias.normal_()
    tokens = torch.randn(7, HIDDEN)
    expected = functional.linear(tokens, score.weight, score.bias)
    assert torch.equal(score(given(tokens)), expected)


def test_initial_weights():
    score = LinearScore(400, 50, bias=True, init_std=0.1)
    assert score.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.count_nonzero(score.bias) == 0
    uniform = LinearScore(400, 50, init_std=None).weight
    assert uniform.abs().max() <= 0.05
    assert uniform.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.05)
    noisy = NoisyLinearScore(HIDDEN, EXPERTS)
    assert torch.count_nonzero(noisy.weight) == torch.count_nonzero(noisy.noise_weight) == 0


def test_noise_has_the_documented_scale_and_stops_in_eval():
    score = NoisyLinearScore(HIDDEN, EXPERTS)
    with torch.no_grad():
        score.weight.normal_()
        score.noise_weight.normal_()
    token = torch.randn(1, HIDDEN)
    tokens = token.expand(20000, HIDDEN)
    clean = token @ score.weight.T
    noise = score(given(tokens)) - clean
    scale = functional.softplus(token @ score.noise_weight.T)[0]
    torch.testing.assert_close(noise.std(0), scale, rtol=0.05, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(EXPERTS), rtol=0, atol=0.1)
    torch.testing.assert_close(score.eval()(given(token)), clean)


def test_autocast_does_not_reach_the_router():
    router = ComposedRouter(LinearScore(HIDDEN, EXPERTS), TopK(2))
    tokens = torch.randn(9, HIDDEN)
    expected = router(given(tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(given(tokens))
    assert torch.equal(routing.router_logits, expected.router_logits)
    assert torch.equal(routing.routing_weights, expected.routing_weights)


def test_meta_device_gives_shapes():
    router = ComposedRouter(LinearScore(HIDDEN, EXPERTS), TopK(2)).to("meta")
    routing = router(given(torch.empty(3, HIDDEN, device="meta")))
    assert routing.router_logits.shape == (3, EXPERTS)
    assert routing.router_logits.is_meta


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
@pytest.mark.parametrize("score", [LinearScore, NoisyLinearScore])
def test_sizes_below_one(score, sizes):
    with pytest.raises(ValueError, match="below 1"):
        score(*sizes)


def test_tokens_of_another_width():
    router = ComposedRouter(LinearScore(HIDDEN, EXPERTS), TopK(2))
    with pytest.raises(ValueError, match="tokens are 7 wide .* in_features=7"):
        router(given(torch.randn(3, 7)))
