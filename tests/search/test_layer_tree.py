"""The search over paths, on problems whose answer is known."""

import itertools
from collections import Counter

import pytest

from moeroute.ops.layer_paths import actions_of_path
from moeroute.search import SearchSettings, search_path
from moeroute.search.edits import edits_of

L = 8
EVERY = [
    tuple(layer for layer, times in enumerate(actions) for _ in range(times))
    for actions in itertools.product((0, 1, 2), repeat=L)
]
PATIENT = SearchSettings(stop_early=False)


def needs(*layers, twice=()):
    """Right where these layers run, and those of `twice` run twice."""

    def reward(path):
        counts = Counter(path)
        runs = all(counts[layer] for layer in layers)
        return float(runs and all(counts[layer] == 2 for layer in twice))

    return reward


def test_edits_skip_one_or_two_and_repeat_one():
    assert set(edits_of((0, 1, 2), 2, 2)) == {
        (1, 2),
        (0, 2),
        (0, 1),
        (2,),
        (0,),
        (0, 0, 1, 2),
        (0, 1, 1, 2),
        (0, 1, 2, 2),
    }
    assert (0, 0, 0, 1) not in edits_of((0, 0, 1), 2, 2)
    assert all(len(path) <= 2 for path in edits_of((0, 1, 2), 2, 2, 2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "reward",
    [
        needs(*range(L)),
        needs(0, 1, 2, 5, 6, 7),
        needs(0, 1, 2, 4, 5, 7),
        needs(0, 1, 2, 7),
        needs(*range(L), twice=(5,)),
    ],
    ids=["all", "a pair", "two apart", "two pairs", "a repeat"],
)
def test_it_finds_the_planted_optimum_within_the_papers_simulations(reward, seed):
    shortest = min(len(path) for path in EVERY if reward(path))
    found = search_path(L, reward, PATIENT, seed=seed)
    assert found.path is not None
    assert reward(found.path) == 1.0
    assert len(found.path) == shortest
    assert found.simulations <= 50
    assert found.is_useful == (shortest != L or not reward(tuple(range(L))))


def test_every_path_is_one_that_a_model_can_run_and_is_tried_once():
    tried = []

    def reward(path):
        tried.append(path)
        return float(len(path) % 2)

    found = search_path(L, reward, PATIENT)
    assert tried[0] == tuple(range(L))
    assert len(set(tried)) == len(tried) == found.simulations == 50
    assert all(max(actions_of_path(path, L)) <= 2 for path in tried)


@pytest.mark.parametrize("budget", [3, 6, 8])
def test_never_over_budget(budget):
    settings = SearchSettings(budget=budget, stop_early=False)
    for reward in (needs(0), needs(0, 1, 2, 3, 4, 5, 6, 7), needs(0, 7), lambda path: len(path)):
        found = search_path(L, reward, settings)
        assert found.path is None or len(found.path) <= budget
        assert max(map(len, found.rewards)) <= L


def test_a_budget_that_cannot_be_met_is_named():
    with pytest.raises(ValueError, match="budget=0 cannot be met: 8 layers need 4 edits of 2"):
        search_path(L, needs(0), SearchSettings(budget=0, simulations=4))
    with pytest.raises(ValueError, match="simulations=0 is below 1"):
        search_path(L, needs(0), SearchSettings(simulations=0))


def test_the_seed_decides():
    runs = [search_path(L, needs(0, 3), PATIENT, seed=seed).rewards for seed in (1, 1, 2)]
    assert list(runs[0]) == list(runs[1]) != list(runs[2])


def test_it_stops_early():
    wrong_first = search_path(L, needs(*range(L), twice=(5,)))
    assert wrong_first.path is not None
    assert wrong_first.simulations < 50
    shorter = search_path(L, needs(0, 1))
    assert len(shorter.path) <= L - 2
    assert shorter.simulations < 10


def test_graded_rewards_are_compared_with_the_plain_path():
    def reward(path):
        return -abs(len(path) - 6) / 10

    found = search_path(L, reward, SearchSettings(solved=None, stop_early=False))
    assert found.reward >= found.plain_reward
    assert len(found.path) == 4  # as good as eight layers: two off the best


def test_nothing_right_is_no_path():
    found = search_path(L, lambda path: 0.0)
    assert found.path is None
    assert not found.is_useful
    assert found.simulations == 50


def test_a_model_of_one_layer_ends():
    found = search_path(1, lambda path: 0.0)
    assert set(found.rewards) <= {(0,), (), (0, 0)}
