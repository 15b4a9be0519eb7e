"""Cosine: logits are bounded, and lengths do not matter."""

import pytest
import torch

from moeroute.methods import Cosine
from moeroute.routers.cosine import CosineScore
from moeroute.types import RouterInput


def given(tokens):
    return RouterInput(hidden_states=tokens, sequence_shape=(1, tokens.shape[0]))


def test_the_equation_by_hand():
    score = CosineScore(6, 4, space_size=3, temperature=-5.0)
    tokens = torch.randn(7, 6)
    places = tokens @ score.projection.weight.T
    expected = 5.0 * torch.cosine_similarity(places[:, None], score.centroids[None], dim=-1)
    torch.testing.assert_close(score(given(tokens)), expected)


@pytest.mark.parametrize("space_size", [0, 3])
def test_bounded_and_blind_to_lengths(space_size):
    score = CosineScore(6, 4, space_size=space_size, temperature=5.0)
    tokens = torch.randn(40, 6)
    logits = score(given(tokens))
    assert logits.abs().max() <= 5.0 + 1e-5
    torch.testing.assert_close(score(given(100 * tokens)), logits)
    with torch.no_grad():
        score.centroids *= torch.rand(4, 1) + 0.1
    torch.testing.assert_close(score(given(tokens)), logits)


def test_a_zero_token_is_finite_with_a_finite_gradient():
    score = CosineScore(6, 4, space_size=3)
    tokens = torch.zeros(2, 6, requires_grad=True)
    score(given(tokens)).sum().backward()
    assert tokens.grad.isfinite().all()


def test_centroids_start_orthogonal():
    centroids = CosineScore(20, 8, space_size=16).centroids
    torch.testing.assert_close(centroids @ centroids.T, torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3])
def test_every_number_of_slots_has_a_gradient(top_k):
    router = Cosine(space_size=4, top_k=top_k).router(6, 5)
    weights = router(given(torch.randn(9, 6))).routing_weights
    if top_k > 1:
        torch.testing.assert_close(weights.sum(-1), torch.ones(9), rtol=0, atol=1e-4)
    (weights * torch.rand_like(weights)).sum().backward()
    for key, parameter in router.named_parameters():
        assert parameter.grad.abs().sum() > 0, key


def test_fields_out_of_range():
    with pytest.raises(ValueError, match="temperature"):
        Cosine(temperature=0.0)
    with pytest.raises(ValueError, match="space_size"):
        Cosine(space_size=-1)
    with pytest.raises(ValueError, match="temperature=0"):
        CosineScore(6, 4, temperature=0.0)
    with pytest.raises(ValueError, match="space_size"):
        CosineScore(6, 4, space_size=-1)
