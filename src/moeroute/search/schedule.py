"""A genetic search of how much each layer gives up, at a given mean over layers.

A schedule is one number a layer on a grid. Parents are the best of a few drawn at random; a child's
number is drawn between theirs and a little beyond, some numbers move by Gaussian noise, and the
whole is brought back to the mean. The best schedules stay.

Source: FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing, 2024,
arXiv 2412.11494, names a genetic search of sparsities; the paper was not read, and the search is
our own reading. Blend crossover: Real-Coded Genetic Algorithms and Interval-Schemata, Eshelman and
Schaffer, 1993.

Axes: L layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

Schedule = tuple[float, ...]
Fitness = Callable[[Sequence[Schedule]], Sequence[float]]
Units = tuple[int, ...]
BISECTIONS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneticSettings:
    """How a schedule is searched.

    Attributes:
        population: Schedules in each generation.
        generations: How many there are, the first one included.
        grid: Step between neighbouring numbers.
        most: The highest number of a layer between the first and the last.
        most_first: Of the first layer; FTP needs 0.
        most_last: Of the last layer.
        tournament: Of how many drawn at random the best becomes a parent.
        blend: How far beyond its parents a child may lie, as a share of their distance.
        mutation_rate: How many of a child's numbers are moved by noise.
        mutation_scale: Standard deviation of the noise.
        elite: How many of the best stay.
    """

    population: int = 32
    generations: int = 30
    grid: float = 0.05
    most: float = 0.9
    most_first: float = 0.0
    most_last: float = 0.0
    tournament: int = 3
    blend: float = 0.5
    mutation_rate: float = 0.2
    mutation_scale: float = 0.1
    elite: int = 4

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("population", "generations", "tournament", "elite"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        for name in ("most", "most_first", "most_last", "mutation_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        if not 0.0 < self.grid <= 1.0:
            raise ValueError(f"grid={self.grid} is outside (0, 1]")
        if self.blend < 0.0 or self.mutation_scale < 0.0:
            raise ValueError(
                f"blend={self.blend} and mutation_scale={self.mutation_scale} must be 0 or more"
            )
        if self.elite > self.population:
            raise ValueError(f"elite={self.elite} is above population={self.population}")

    def caps(self, layers: int) -> Units:
        """(L,) the highest number of every layer, in steps of the grid."""
        most = [self.most] * layers
        most[0], most[-1] = self.most_first, self.most_last
        return tuple(int(share / self.grid + 1e-9) for share in most)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSearch:
    """What a search found.

    Attributes:
        schedule: (L,) the best.
        fitness: Its fitness.
        even_fitness: Of the schedule that is as even as its bounds allow, where the search began.
        history: The best fitness after every generation.
        evaluated: Schedule -> fitness of all that were tried.
    """

    schedule: Schedule
    fitness: float
    even_fitness: float
    history: tuple[float, ...]
    evaluated: dict[Schedule, float] = field(default_factory=dict, repr=False)


def search_schedule(
    layers: int,
    mean: float,
    fitness: Fitness,
    settings: GeneticSettings | None = None,
    *,
    seed: int = 0,
    each: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> ScheduleSearch:
    """Search the schedule of highest fitness whose mean is `mean`, to the nearest step of the grid.

    The same seed and fitness give the same search. A schedule is tried once.

    Args:
        layers: L.
        mean: Over all layers, the bounded ones included.
        fitness: Of the schedules of a generation that were never tried, one number each.
        settings: How to search.
        seed: Of all that is drawn.
        each: Passes the generations on, such as a progress bar.

    Raises:
        ValueError: The mean cannot be met under the bounds.
    """
    settings = settings or GeneticSettings()
    population = _Population(layers, mean, fitness, settings, random.Random(seed))
    for _ in each(range(settings.generations)):
        population.advance()
    return population.result()


class _Population:
    def __init__(
        self,
        layers: int,
        mean: float,
        fitness: Fitness,
        settings: GeneticSettings,
        chance: random.Random,
    ) -> None:
        if layers < 1:
            raise ValueError(f"layers={layers} is below 1")
        self.settings, self.chance, self.fitness = settings, chance, fitness
        self.caps = settings.caps(layers)
        self.total = round(mean * layers / settings.grid)
        if not 0 <= self.total <= sum(self.caps):
            highest = sum(self.caps) * settings.grid / layers
            raise ValueError(
                f"a mean of {mean} over {layers} layers cannot be met: their bounds (most="
                f"{settings.most}, most_first={settings.most_first}, most_last="
                f"{settings.most_last}) allow 0 to {highest:.3f}"
            )
        self.even = project([float(self.total)] * layers, self.caps, self.total)
        self.tried: dict[Units, float] = {}
        self.members: list[Units] = []
        self.history: list[float] = []

    def advance(self) -> None:
        """Make the next generation, and try what is new in it."""
        first = not self.members
        members = [self.even] if first else self._best(self.settings.elite)
        while len(members) < self.settings.population:
            members.append(self._random() if first else self._child())
        fresh = [units for units in dict.fromkeys(members) if units not in self.tried]
        if fresh:
            values = self.fitness([self._schedule(units) for units in fresh])
            self.tried.update(zip(fresh, map(float, values), strict=True))
        self.members = members
        self.history.append(self.tried[self._best(1)[0]])

    def result(self) -> ScheduleSearch:
        """The best of all that were tried."""
        best = self._best(1)[0]
        return ScheduleSearch(
            schedule=self._schedule(best),
            fitness=self.tried[best],
            even_fitness=self.tried[self.even],
            history=tuple(self.history),
            evaluated={self._schedule(units): value for units, value in self.tried.items()},
        )

    def _best(self, count: int) -> list[Units]:
        return sorted(self.tried, key=lambda units: (-self.tried[units], units))[:count]

    def _random(self) -> Units:
        drawn = [self.chance.uniform(0, cap) for cap in self.caps]
        return project(drawn, self.caps, self.total)

    def _parent(self) -> Units:
        drawn = [self.chance.choice(self.members) for _ in range(self.settings.tournament)]
        return max(drawn, key=lambda units: self.tried[units])

    def _child(self) -> Units:
        settings, chance = self.settings, self.chance
        child = []
        for one, other in zip(self._parent(), self._parent(), strict=True):
            beyond = settings.blend * abs(one - other)
            value = chance.uniform(min(one, other) - beyond, max(one, other) + beyond)
            if chance.random() < settings.mutation_rate:
                value += chance.gauss(0.0, settings.mutation_scale / settings.grid)
            child.append(value)
        return project(child, self.caps, self.total)

    def _schedule(self, units: Units) -> Schedule:
        return tuple(round(unit * self.settings.grid, 10) for unit in units)


def project(values: Sequence[float], caps: Units, total: int) -> Units:
    """The whole numbers between 0 and their caps that sum to `total`, near to `values`.

    All values are moved by one number until the sum is right, then rounded down; what is missing
    goes to those that lost most, the first of equals.

    Args:
        values: (L,).
        caps: (L,) 0 or more.
        total: At most the sum of the caps.
    """
    low = -max(values, default=0.0) - 1.0
    high = max(caps, default=0) - min(values, default=0.0) + 1.0

    def moved(shift: float) -> list[float]:
        return [min(max(value + shift, 0.0), cap) for value, cap in zip(values, caps, strict=True)]

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(moved(middle)) < total else (low, middle)
    exact = moved(high)
    whole = [min(int(value + 1e-9), cap) for value, cap in zip(exact, caps, strict=True)]
    order = sorted(range(len(whole)), key=lambda place: whole[place] - exact[place])
    while sum(whole) < total:
        for place in order:
            if sum(whole) < total and whole[place] < caps[place]:
                whole[place] += 1
    return tuple(whole)
