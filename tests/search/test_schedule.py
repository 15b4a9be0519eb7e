"""The genetic search of a number a layer, on problems whose best schedule is known."""

import itertools
import math

import pytest

from moeroute.search import GeneticSettings, search_schedule

COSTS = (0.0, 3.0, 0.5, 2.0, 1.0, 0.0)


def planted(schedules):
    """The cheapest way to give up 1.2 in all: what layers 1 to 4 give up costs its square."""
    return [
        -sum(cost * share**2 for cost, share in zip(COSTS, one, strict=True)) for one in schedules
    ]


def best_of_all(grid, mean):
    """By trying all."""
    steps = range(int(0.9 / grid + 1e-9) + 1)
    total = round(mean * len(COSTS) / grid)
    return max(
        planted([[0.0, *(grid * step for step in some), 0.0]])[0]
        for some in itertools.product(steps, repeat=4)
        if sum(some) == total
    )


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_best_of_a_planted_problem(seed):
    found = search_schedule(6, 0.2, planted, GeneticSettings(grid=0.1), seed=seed)
    assert found.fitness == pytest.approx(best_of_all(0.1, 0.2))
    assert found.fitness > found.even_fitness
    assert found.schedule == max(found.evaluated, key=found.evaluated.__getitem__)


def test_every_schedule_keeps_the_mean_the_grid_and_the_bounds():
    settings = GeneticSettings(generations=5, most=0.5, most_last=0.1)
    found = search_schedule(6, 0.25, planted, settings)
    for schedule in found.evaluated:
        assert math.isclose(sum(schedule) / 6, 0.25, abs_tol=1e-9)
        assert all(math.isclose(share / 0.05, round(share / 0.05)) for share in schedule)
        assert schedule[0] == 0.0
        assert schedule[-1] <= 0.1 + 1e-9
        assert max(schedule) <= 0.5 + 1e-9


def test_the_same_seed_gives_the_same_search_and_nothing_is_tried_twice():
    asked = []

    def fitness(schedules):
        asked.extend(schedules)
        return planted(schedules)

    settings = GeneticSettings(generations=6)
    first = search_schedule(6, 0.2, fitness, settings, seed=4)
    assert len(asked) == len(set(asked)) == len(first.evaluated)
    assert list(first.history) == sorted(first.history)
    assert search_schedule(6, 0.2, planted, settings, seed=4) == first
    assert search_schedule(6, 0.2, planted, settings, seed=5) != first


def test_a_mean_that_cannot_be_met():
    with pytest.raises(ValueError, match="0.9"):
        search_schedule(6, 0.9, planted)
    for wrong in ({"population": 0}, {"grid": 0.0}, {"most": 1.5}, {"elite": 40}, {"blend": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GeneticSettings(**wrong)
