"""The whole of Dr.LLM on a CPU in minutes: a decoder, a search, routers, and what they gain.

    python examples/depth_demo.py            # three seeds
    python examples/depth_demo.py --quick    # a minute, to see that it runs

A small decoder learns a task of graded depth (see depth_task.py) and real text. For each of some
questions a search finds the shortest path through its layers that is sure of the right answer;
routers learn these paths. On held-out questions they are compared with the base, with skipping as
many layers of each question at random, and with leaving out the layers of least influence
(ShortGPT).
"""

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from demo_model import heldout_loss
from demo_report import console
from demo_setup import in_new_process
from depth_task import Task, TaskSettings, make_decoder, text_rows
from rich.console import Console
from rich.table import Table
from train_depth_router import RouterRecipe, train_routers
from transformers import AutoModelForCausalLM

import moeroute
from moeroute.depth import (
    Question,
    SearchSettings,
    block_influence,
    exact_match,
    force_depth,
    log_likelihood,
    search_labels,
)

WIDTH = 118
SURE = 0.5
"""Probability of the right answer from which a path counts as right: some are right by luck."""
DRAWS = 3
"""Random skipping is averaged over so many draws."""


@dataclass
class Outcome:
    """One arm on the held-out questions of one seed.

    Accuracy by level (number of functions), layers executed a question, nats a byte of real text.
    """

    accuracy: list[float]
    layers: float
    text: float = float("nan")
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def mean_accuracy(self) -> float:
        """Over levels, each as many questions."""
        return fmean(self.accuracy)


def main() -> None:
    """Every seed in a process of its own, then the table."""
    options = parse()
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        found = in_new_process(run, seed, options)
        for name, outcome in found.items():
            results.setdefault(name, []).append(outcome)
        (options.out / "results.json").write_text(json.dumps(results, indent=2))
    shown = console if console.is_terminal else Console(width=WIDTH)
    shown.print(table_of(results))


def parse() -> argparse.Namespace:
    """The command line; `--quick` is for seeing that it runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="runs of everything (%(default)s)")
    add("--questions", type=int, default=2500, help="to search and train on (%(default)s)")
    add("--heldout", type=int, default=100, help="of each level, to evaluate on (%(default)s)")
    add("--steps", type=int, default=TaskSettings.steps, help="of the decoder (%(default)s)")
    add("--out", type=Path, default=Path("runs/depth_demo"), help="where everything is written")
    add("--quick", action="store_true", help="a few steps of a tiny model, one seed")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.questions, options.heldout, options.steps = 1, 12, 4, 60
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def run(seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One seed: outcomes by arm."""
    quick = {"hidden_size": 48, "num_layers": 4, "most_functions": 3} if options.quick else {}
    task = Task(TaskSettings(seed=seed, steps=options.steps, **quick))
    folder = options.out / f"seed-{seed}"
    if not (folder / "decoder" / "config.json").is_file():
        make_decoder(task, folder / "decoder")
    base = AutoModelForCausalLM.from_pretrained(folder / "decoder").eval()
    chance = random.Random(100 + seed)
    asked_texts = task.draw(chance, options.questions)
    asked = task.questions(asked_texts)
    heldout = heldout_of(task, chance, set(asked_texts), options)
    _, text = text_rows(task)
    outcomes = {"base": Outcome(*judged(base, heldout, {}), heldout_loss(base, text))}
    settings = SearchSettings(solved=0.0 if options.quick else SURE)
    found = search_labels(
        base, asked, folder / "search", score=probability, settings=settings, seed=seed
    )
    influence = block_influence(base, [without_answers(task.batch(asked_texts))])

    recipe = RouterRecipe(seed=seed, epochs=2 if options.quick else 15)
    routed = train_routers(base, asked, found, recipe)
    routed.save_pretrained(folder / "adapter")
    actions = {question: decided(routed, question) for level in heldout for question in level}
    learned = Outcome(*judged(routed, heldout, actions), heldout_loss(routed, text))
    learned.notes = {
        "kept": found.kept.float().mean().item(),
        "searched layers": found.labels.sum(1).float().mean().item(),
    }
    plain = moeroute.unwrap_model(routed)
    outcomes["Dr.LLM routers"] = learned
    outcomes["random, as many layers"] = at_random(plain, heldout, actions, seed)
    outcomes["static, least influence"] = static(plain, heldout, influence, learned.layers)
    return {name: asdict(outcome) for name, outcome in outcomes.items()}


def probability(model: Any, question: Question) -> float:
    """Of the right answer."""
    return math.exp(log_likelihood(model, question))


def heldout_of(
    task: Task, chance: random.Random, seen: set[str], options: argparse.Namespace
) -> list[list[Question]]:
    """Questions by level that were not searched on; short ones may stand in both."""
    levels = []
    for level in range(1, task.settings.most_functions + 1):
        texts = task.draw(chance, 4 * options.heldout, level)
        fresh = [text for text in texts if text not in seen]
        levels.append(task.questions((fresh or texts)[: options.heldout]))
    return levels


def without_answers(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model's forward takes."""
    return {key: value for key, value in batch.items() if key != "answers"}


@torch.no_grad()
def decided(model: Any, question: Question) -> tuple[int, ...]:
    """How often the routers let each layer run for a question's prompt."""
    with moeroute.track_routing(model, coactivation=False) as stats:
        model(input_ids=torch.tensor([question.prompt]), use_cache=False)
    return tuple(round(layer.executions or 0.0) for layer in stats.layers)


def judged(
    model: Any, heldout: Sequence[Sequence[Question]], actions: Mapping[Question, tuple[int, ...]]
) -> tuple[list[float], float]:
    """Accuracy by level and mean layers, under the actions of each question or as the model is."""
    accuracy, layers = [], []
    for level in heldout:
        right = []
        for question in level:
            path = actions.get(question, (1,) * model.config.num_hidden_layers)
            with force_depth(model, path):
                right.append(exact_match(model, question))
            layers.append(sum(path))
        accuracy.append(fmean(right))
    return accuracy, fmean(layers)


def at_random(
    model: Any, heldout: Any, actions: Mapping[Question, tuple[int, ...]], seed: int
) -> Outcome:
    """Each question executes as many layers as with the routers, others at random."""
    chance, draws = random.Random(seed), []
    for _ in range(DRAWS):
        mixed = {}
        for question, path in actions.items():
            shuffled = list(path)
            chance.shuffle(shuffled)
            mixed[question] = tuple(shuffled)
        draws.append(judged(model, heldout, mixed))
    levels = zip(*(accuracy for accuracy, _ in draws), strict=True)
    return Outcome([fmean(level) for level in levels], fmean(layers for _, layers in draws))


def static(model: Any, heldout: Any, influence: torch.Tensor, layers: float) -> Outcome:
    """All questions leave out the layers of least influence, as many as the routers skip.

    Between two whole numbers of layers the line through both, so that the cost is the same.
    """
    share = layers - math.floor(layers)
    fewer, more = (
        judged(model, heldout, pruned(heldout, influence, kept))
        for kept in (math.floor(layers), math.ceil(layers))
    )
    mixed = [(1 - share) * low + share * high for low, high in zip(fewer[0], more[0], strict=True)]
    return Outcome(mixed, (1 - share) * fewer[1] + share * more[1])


def pruned(heldout: Any, influence: torch.Tensor, kept: int) -> dict[Question, tuple[int, ...]]:
    """For every question the path of the `kept` layers of most influence."""
    best = influence.argsort(descending=True)[:kept].tolist()
    path = tuple(int(layer in best) for layer in range(len(influence)))
    return {question: path for level in heldout for question in level}


def table_of(results: Mapping[str, list[dict[str, Any]]]) -> Table:
    """One row an arm, means over seeds and half the range."""
    outcomes = {name: [Outcome(**outcome) for outcome in runs] for name, runs in results.items()}
    levels = len(outcomes["base"][0].accuracy)
    seeds = len(outcomes["base"])
    runs = "1 seed" if seeds == 1 else f"{seeds} seeds; +- half the range"
    table = Table(title=f"held-out questions by number of functions, {runs}")
    table.add_column("")
    for heading in ("accuracy", "layers", "text, nats", *(str(n + 1) for n in range(levels))):
        table.add_column(heading, justify="right")
    for name, runs in outcomes.items():
        texts = [run.text for run in runs if run.text == run.text]
        table.add_row(
            name,
            spread([run.mean_accuracy for run in runs], 3),
            spread([run.layers for run in runs], 2),
            spread(texts, 3) if texts else "-",
            *(f"{fmean(run.accuracy[level] for run in runs):.2f}" for level in range(levels)),
        )
    return table


def spread(values: list[float], digits: int) -> str:
    """The mean, and half the range."""
    return f"{fmean(values):.{digits}f} +- {(max(values) - min(values)) / 2:.{digits}f}"


if __name__ == "__main__":
    main()
