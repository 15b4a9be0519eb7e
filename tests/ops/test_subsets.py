"""Draws without replacement and their log-probabilities."""

from itertools import permutations

import torch

from moeroute.ops.subsets import draw_subsets, subset_log_prob


def ordered(experts, size):
    return torch.tensor(list(permutations(range(experts), size)))


def by_definition(logits, drawn):
    """The product of chances, each of what is not drawn yet."""
    probs = torch.softmax(logits, -1)
    total, left = 0.0, 1.0
    for index in drawn.tolist():
        total = total + torch.log(probs[index] / left)
        left = left - probs[index]
    return total


def test_log_prob_equals_the_definition():
    logits = torch.randn(5, dtype=torch.double)
    for size in (1, 2, 4):
        drawn = ordered(5, size)
        ours = subset_log_prob(logits.expand(len(drawn), 5), drawn)
        torch.testing.assert_close(ours, torch.stack([by_definition(logits, d) for d in drawn]))


def test_all_ordered_draws_have_probability_one_together():
    logits = 3 * torch.randn(5, dtype=torch.double)
    for size in range(1, 6):
        drawn = ordered(5, size)
        total = subset_log_prob(logits.expand(len(drawn), 5), drawn).exp().sum()
        torch.testing.assert_close(total, torch.ones_like(total))


def test_frequencies_of_draws_are_their_probabilities():
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    drawn, count = ordered(4, 2), 40_000
    seen = draw_subsets(logits.expand(count, 4), 2)
    found = (seen.unsqueeze(1) == drawn).all(2).double().mean(0)
    expected = subset_log_prob(logits.expand(12, 4), drawn).exp().double()
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 5 * error).all()
    torch.testing.assert_close(found.sum(), torch.ones_like(found.sum()))


def test_gradient_is_one_hot_minus_the_softmax_over_what_remains():
    logits = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    drawn = draw_subsets(logits, 3)
    (ours,) = torch.autograd.grad(subset_log_prob(logits, drawn).sum(), logits)
    expected = torch.zeros_like(logits)
    with torch.no_grad():
        for row, ids in enumerate(drawn.tolist()):
            for place, index in enumerate(ids):
                rest = logits[row].clone()
                rest[ids[:place]] = -torch.inf
                expected[row] -= torch.softmax(rest, -1)
                expected[row, index] += 1
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours.sum(1), torch.zeros(6, dtype=torch.double))


def test_nothing_is_lost_where_the_drawn_have_all_the_probability():
    """1 minus the drawn probabilities underflows here in float32."""
    logits = torch.tensor([[60.0, 30.0, 1.0, 0.0]], requires_grad=True)
    drawn = torch.tensor([[0, 1, 3]])
    log_prob = subset_log_prob(logits, drawn)
    torch.testing.assert_close(log_prob, torch.tensor([-1.3132616]))  # log(1 / (1 + e))
    log_prob.sum().backward()
    assert logits.grad.isfinite().all()


def test_everybody_drawn_nobody_there_and_gradcheck():
    logits = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    drawn = draw_subsets(logits, 3)
    assert drawn.sort(1).values.tolist() == [[0, 1, 2]] * 4
    assert torch.autograd.gradcheck(lambda z: subset_log_prob(z, drawn), (logits,))
    empty = torch.zeros(0, 3)
    assert subset_log_prob(empty, draw_subsets(empty, 2)).shape == (0,)
