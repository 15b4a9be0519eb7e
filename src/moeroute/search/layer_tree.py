"""Monte-Carlo tree search over paths through the layers of a model.

A node is a path, the root the plain order of all layers. An edit skips one or two neighbours, or
repeats one layer once more. Who is visited next has the highest

    Q / v + c sqrt(ln V / v) - lambda * len(path) / L

Source: Dr.LLM: Dynamic Layer Routing in LLMs, 2025, arXiv 2510.12773, section 3 and appendix.
Differences from the paper: V is the parent's own number of visits (in the official code the number
of the simulation); a budget on a path's length; and the order in which children are visited for
the first time (our own reading): edits that did no harm elsewhere in the tree, then those that were
never tried, then the others; among them the shortest path first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from moeroute.search.edits import Edit, edits_of

Path = tuple[int, ...]
Reward = Callable[[Path], float]
UNTRIED = -1e-9  # as gains go: behind no harm, ahead of any


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How a path is searched. Defaults are the paper's.

    Attributes:
        simulations: Paths that are tried, the plain one included; a path met twice is tried once.
        exploration: c.
        length_penalty: lambda.
        random_share: How often a child is taken at random.
        skip_block: Most neighbours that one edit skips.
        max_executions: Most times that a layer stands in a path.
        budget: Most layers of a path, or None: as many as edits can make.
        solved: Reward from which a path is right; None: that of the plain path.
        stop_early: Stop once a right path was found where the plain one is wrong, or one that is at
            least two layers shorter.
    """

    simulations: int = 50
    exploration: float = 1.8
    length_penalty: float = 3.0
    random_share: float = 0.1
    skip_block: int = 2
    max_executions: int = 2
    budget: int | None = None
    solved: float | None = 1.0
    stop_early: bool = True

    def check(self, layers: int) -> None:
        """Raise ValueError if nothing could be searched in a model of so many layers."""
        least = {"simulations": 1, "skip_block": 1, "max_executions": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} is below {low}")
        if not 0.0 <= self.random_share <= 1.0:
            raise ValueError(f"random_share={self.random_share} is outside [0, 1]")
        if self.budget is None:
            return
        edits = max(0, math.ceil((layers - self.budget) / self.skip_block))
        if self.budget < 0 or edits >= self.simulations:
            raise ValueError(
                f"budget={self.budget} cannot be met: {layers} layers need {edits} edits of "
                f"{self.skip_block} to come down to it, and simulations={self.simulations} allow "
                f"{self.simulations - 1}; raise the budget or the simulations"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PathSearch:
    """What a search found.

    Attributes:
        path: The shortest right path within the budget; None if there is none.
        reward: Its reward, or the plain path's.
        plain_reward: Of the plain path.
        layers: L.
        simulations: Paths that were tried.
    """

    path: Path | None
    reward: float
    plain_reward: float
    layers: int
    simulations: int
    rewards: dict[Path, float] = field(default_factory=dict, repr=False)

    @property
    def is_useful(self) -> bool:
        """Whether it teaches something: right where the plain path is wrong, or shorter."""
        if self.path is None:
            return False
        return len(self.path) < self.layers or self.reward > self.plain_reward


@dataclass(slots=True)
class _Node:
    path: Path
    edit: Edit = Edit()
    total: float = 0.0
    visits: int = 0
    children: list[_Node] | None = None


def search_path(
    layers: int, reward: Reward, settings: SearchSettings | None = None, *, seed: int = 0
) -> PathSearch:
    """Search the shortest path that is right.

    Args:
        layers: L.
        reward: Of a path: layer indices in the order of their execution.
        settings: How to search.
        seed: The same seed and rewards give the same search.

    Raises:
        ValueError: A setting is out of range, or the budget cannot be met.
    """
    settings = settings or SearchSettings()
    settings.check(layers)
    tree = _Tree(layers, reward, settings, random.Random(seed))
    while not tree.is_done():
        tree.simulate()
    return tree.result()


class _Tree:
    def __init__(
        self, layers: int, reward: Reward, settings: SearchSettings, chance: random.Random
    ) -> None:
        self.layers, self.reward, self.settings, self.chance = layers, reward, settings, chance
        self.root = _Node(tuple(range(layers)))
        self.rewards: dict[Path, float] = {}
        self.gains: dict[Edit, float] = {}
        self.idle = 0

    def simulate(self) -> None:
        """Walk to a node, try its path, tell the nodes above."""
        walk = [self.root]
        while walk[-1].visits:
            child = self._choose(walk[-1])
            if child is None:
                break
            walk.append(child)
        known = walk[-1].path in self.rewards
        self.idle = self.idle + 1 if known else 0
        if not known:
            self.rewards[walk[-1].path] = float(self.reward(walk[-1].path))
        if len(walk) > 1:
            gain = self.rewards[walk[-1].path] - self.rewards[walk[-2].path]
            edit = walk[-1].edit
            self.gains[edit] = max(gain, self.gains.get(edit, gain))
        for node in walk:
            node.total += self.rewards[walk[-1].path]
            node.visits += 1

    def is_done(self) -> bool:
        """Whether the simulations are used up, nothing new is met, or enough was found."""
        full = len(self.rewards) >= self.settings.simulations
        return full or self.idle > self.settings.simulations or self._is_enough()

    def result(self) -> PathSearch:
        """The shortest right path; of equals, that of the fewest different layers."""
        right = [path for path in self.rewards if self._is_right(path)]
        plain = self.rewards[self.root.path]
        best = min(right, key=self._rank, default=None)
        return PathSearch(
            path=best,
            reward=plain if best is None else self.rewards[best],
            plain_reward=plain,
            layers=self.layers,
            simulations=len(self.rewards),
            rewards=self.rewards,
        )

    @staticmethod
    def _rank(path: Path) -> tuple[int, int, Path]:
        return len(path), len(set(path)), path

    def _is_right(self, path: Path) -> bool:
        solved, budget = self.settings.solved, self.settings.budget
        least = self.rewards[self.root.path] if solved is None else solved
        return self.rewards[path] >= least and (budget is None or len(path) <= budget)

    def _is_enough(self) -> bool:
        if not self.settings.stop_early or self.root.path not in self.rewards:
            return False
        plain_is_right = self._is_right(self.root.path)
        enough = self.layers - 2 if plain_is_right else 2 * self.layers
        return any(self._is_right(path) and len(path) <= enough for path in self.rewards)

    def _choose(self, node: _Node) -> _Node | None:
        if node.children is None:
            node.children = [_Node(path, edit) for path, edit in self._edits(node.path).items()]
            self.chance.shuffle(node.children)
        if not node.children:
            return None
        if self.chance.random() < self.settings.random_share:
            return self.chance.choice(node.children)
        fresh = [child for child in node.children if not child.visits]
        if fresh:
            return max(fresh, key=self._promise)
        return max(node.children, key=lambda child: self._value(child, node))

    def _promise(self, child: _Node) -> tuple[float, int]:
        return self.gains.get(child.edit, UNTRIED), -len(child.path)

    def _edits(self, path: Path) -> dict[Path, Edit]:
        limit = self.settings.budget
        longest = max(len(path), limit) if limit is not None else None
        return edits_of(path, self.settings.skip_block, self.settings.max_executions, longest)

    def _value(self, child: _Node, parent: _Node) -> float:
        curious = self.settings.exploration * math.sqrt(math.log(parent.visits) / child.visits)
        length = self.settings.length_penalty * len(child.path) / self.layers
        return child.total / child.visits + curious - length
