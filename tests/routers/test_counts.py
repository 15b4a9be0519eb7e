"""Selections of as many experts as the token calls for, and scores that look elsewhere."""

import pytest
import torch

from moeroute.routers import (
    ComposedRouter,
    HashScore,
    LinearScore,
    MLPScore,
    NoisyScore,
    Positive,
    PositiveRMS,
    Threshold,
    TopK,
    TopKSoftmax,
    TopP,
    balanced_table,
    fixed,
    softmax_probs,
)
from moeroute.types import RouterInput


def test_the_fewest_experts_that_reach_top_p():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.9, 0.04, 0.03, 0.03], [0.25] * 4])
    selection = TopP(0.7)(probs.log())
    assert selection.selected_experts[:2].tolist() == [[0, 1, 4, 4], [0, 4, 4, 4]]
    assert (selection.selected_experts[2] < 4).sum() == 3
    torch.testing.assert_close(selection.routing_weights[0], torch.tensor([0.5, 0.3, 0.0, 0.0]))
    normalized = TopP(0.7, normalize=True)(probs.log()).routing_weights
    torch.testing.assert_close(normalized.sum(1), torch.ones(3))
    assert (TopP(1.0)(torch.randn(5, 4)).selected_experts < 4).all()


def test_a_threshold_and_a_least():
    logits = torch.tensor([[2.0, -2.0, 1.0], [-3.0, -2.0, -4.0]])
    selection = Threshold(0.5)(logits)
    assert selection.selected_experts.tolist() == [[0, 2, 3], [1, 3, 3]]
    assert Threshold(0.5, least=0)(logits).selected_experts.tolist() == [[0, 2, 3], [3, 3, 3]]
    shares = Threshold(0.0, probs=softmax_probs, normalize=True)(logits).routing_weights
    torch.testing.assert_close(shares.sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TopP(0.0), "top_p=0.0"),
        (lambda: TopP(0.5, max_slots=5).check(4), "max_slots=5"),
        (lambda: Threshold(-0.1), "threshold=-0.1"),
        (lambda: Threshold(0.1, least=5).check(4), "exceeds the 4"),
        (lambda: PositiveRMS(3).check(4), "3 experts but the router 4"),
        (lambda: HashScore(4, 5), "exceeds the 4"),
        (lambda: HashScore(4, score=LinearScore(3, 5)), "num_experts=5"),
        (lambda: HashScore(4).set_table(torch.tensor([[4]])), "does not fit"),
        (lambda: MLPScore(3, 4, width=0), "width=0"),
    ],
)
def test_what_cannot_be(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def block_reference(logits, scale, eps=1e-6):
    active = logits.relu()
    return active * torch.rsqrt(active.square().mean(-1, keepdim=True) + eps) * scale


def test_positive_weights_are_the_logits():
    logits = torch.tensor([[1.5, -1.0, 0.0], [-1.0, -2.0, -3.0]], requires_grad=True)
    selection = Positive()(logits)
    assert selection.selected_experts.tolist() == [[0, 3, 3], [3, 3, 3]]
    selection.routing_weights.sum().backward()
    assert logits.grad.tolist() == [[1, 0, 0], [0, 0, 0]]


def test_relative_weights_do_not_know_the_size_of_the_logits():
    torch.manual_seed(0)
    logits, select = torch.randn(12, 8), PositiveRMS(8)
    weights = select(logits).routing_weights
    torch.testing.assert_close(weights, block_reference(logits, torch.ones(8)))
    torch.testing.assert_close(select(5 * logits).routing_weights, weights, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.square().sum(1), torch.full((12,), 8.0), rtol=1e-3, atol=0)
    assert torch.equal(select(logits).selected_experts < 8, logits > 0)
    with torch.no_grad():
        select.scale.copy_(torch.linspace(-1, 2, 8))
    expected = block_reference(logits, select.scale)
    torch.testing.assert_close(select(logits).routing_weights, expected)
    dead = torch.full((2, 8), -1.0, requires_grad=True)
    select(dead).routing_weights.sum().backward()
    assert (dead.grad == 0).all()


def hashed(score, ids, tokens=None):
    tokens = torch.randn(len(ids), 3) if tokens is None else tokens
    return score(RouterInput(hidden_states=tokens, sequence_shape=(1, len(ids)), token_ids=ids))


def test_an_id_has_its_experts_whatever_the_token_says():
    router = ComposedRouter(HashScore(8, 2, table_size=100, seed=3), TopKSoftmax(2))
    ids = torch.tensor([5, 5, 105, 6])
    chosen = hashed(router, ids).selected_experts.sort(1).values
    assert torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])  # beyond the table
    again = ComposedRouter(HashScore(8, 2, table_size=100, seed=4), TopKSoftmax(2))
    assert not torch.equal(again.score.table, router.score.table)
    again.load_state_dict(router.state_dict())
    assert torch.equal(hashed(again.eval(), ids).selected_experts.sort(1).values, chosen)
    assert (hashed(router, ids).routing_weights == 0.5).all()
    counts = torch.bincount(router.score.table[:, 0], minlength=8)
    assert counts.max() - counts.min() <= 1
    assert not list(router.parameters())


def test_without_ids_it_says_what_to_do():
    with pytest.raises(ValueError, match="call the model with input_ids"):
        HashScore(4)(RouterInput(hidden_states=torch.randn(2, 3), sequence_shape=(1, 2)))


def test_a_score_weighs_the_experts_of_the_id():
    score = LinearScore(3, 8)
    router = ComposedRouter(HashScore(8, 2, table_size=9, score=score), TopKSoftmax(2))
    ids, tokens = torch.arange(6), torch.randn(6, 3)
    routing = hashed(router, ids, tokens)
    logits = tokens @ score.weight.T
    expected = torch.softmax(logits.gather(1, routing.selected_experts), 1)
    torch.testing.assert_close(routing.routing_weights, expected)
    assert torch.equal(routing.selected_experts.sort(1).values, router.score.table[ids].sort(1)[0])


def test_a_table_by_frequency_balances_the_load():
    counts = torch.tensor([100, 60, 50, 30, 20, 10, 5, 5])
    score = HashScore(2, table_size=8)
    score.set_table(balanced_table(counts, 2))
    load = torch.zeros(2).scatter_add(0, score.table[:, 0], counts.float())
    assert load.tolist() == [140, 140]
    assert balanced_table(counts, 4, 2).unique(dim=1).shape == (8, 2)


def test_a_fixed_score_is_saved_and_never_trained():
    score = fixed(LinearScore(3, 4, bias=True))
    assert not list(score.parameters())
    assert set(score.state_dict()) == {"weight", "bias"}
    tokens = torch.randn(5, 3, requires_grad=True)
    router = ComposedRouter(score, TopK(2))
    hashed(router, torch.arange(5), tokens).routing_weights.square().sum().backward()
    assert tokens.grad.abs().sum() > 0


def test_an_mlp_score_is_two_linears_and_a_tanh():
    score, tokens = MLPScore(3, 4, width=5), torch.randn(6, 3)
    expected = torch.tanh(tokens @ score.inner.weight.T) @ score.outer.weight.T
    torch.testing.assert_close(hashed(score, torch.arange(6), tokens), expected)


def test_noise_has_the_scale_that_the_token_chooses_and_eval_has_none():
    torch.manual_seed(0)
    inner = LinearScore(3, 4)
    score, token = NoisyScore(inner), torch.randn(1, 3)
    with torch.no_grad():
        score.noise_weight.copy_(torch.randn(4, 3))
    many, ids = token.expand(20000, 3), torch.arange(20000)
    noise = hashed(score, ids, many) - hashed(inner, ids, many)
    scale = torch.nn.functional.softplus(token @ score.noise_weight.T)[0] + 1e-2
    torch.testing.assert_close(noise.std(0), scale, rtol=0.03, atol=0)
    torch.testing.assert_close(noise.mean(0) / scale, torch.zeros(4), rtol=0, atol=0.03)
    assert torch.equal(hashed(score.eval(), ids, many), hashed(inner, ids, many))
