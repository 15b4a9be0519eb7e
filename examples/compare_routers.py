"""Compare routers of a small MoE language model at equal active parameters.

    python examples/compare_routers.py                       # every arm, three seeds
    python examples/compare_routers.py --arms "linear, top 2;cosine, top 2" --seeds 1

Every arm is the same model on the same rows in the same order; a token passes experts of the same
width together, however many they are. Coupling is the ERC loss without noise, 0 where every expert
answers most to its own row of the router; epsilon is how far rows lie apart, 0.71 where they are
orthogonal. Seeds differ more than routers, so each run is also compared with the linear router's of
its seed. "Equifinality in Mixture of Experts" claims that variants of the router end within a
perplexity point of each other, a linear one slightly ahead: the table says what is seen here.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

import torch
from demo_report import console
from demo_setup import in_new_process
from moe_lm import PLAIN
from rich.console import Console
from rich.table import Table
from train_moe_lm import Outcome, Recipe, model_settings, slots, text_rows, train

WIDTH = 116
LINEAR = "linear, top 2"
ROUTING = {
    "experts a token": "experts\na token",
    "load cv": "load CV",
    "dead": "dead",
    "epsilon": "epsilon",
    "coupling": "coupling",
}
"""Measured routing and its headings."""


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        router: A method's registered name, or "dense".
        fields: Of the method.
        losses: Class names of `moeroute.losses` and weights, beside the method's own.
    """

    router: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)


TOP_2: Mapping[str, Any] = MappingProxyType({"top_k": 2})
ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "dense": Arm(PLAIN),
        "switch, top 1": Arm("switch"),
        LINEAR: Arm("switch", TOP_2),
        "linear, top 2, ERC": Arm("switch", TOP_2, {"ERCLoss": 1.0}),
        "cosine, top 2": Arm("cosine", TOP_2),
        "recurrent, top 2": Arm("rmoe", TOP_2),
        "sigmoid and bias, top 2": Arm("aux_free", TOP_2),
    }
)


def main() -> None:
    """Run every arm, show the table."""
    options = parse()
    rows = in_new_process(text_rows_of, options.out, options.quick)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.arms:
        results[name] = [
            in_new_process(run, name, seed, rows, options) for seed in range(options.seeds)
        ]
        (options.out / "results.json").write_text(json.dumps(results, indent=2))
    shown = console if console.is_terminal else Console(width=WIDTH)
    shown.print(table_of(results, options))


def parse() -> argparse.Namespace:
    """Options; `--quick` is for seeing that it runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arms", type=lambda text: text.split(";"), default=list(ARMS), help="separated by ;")
    add("--seeds", type=int, default=3, help="runs of every arm (%(default)s)")
    add("--steps", type=int, default=300, help="training steps (%(default)s)")
    add("--hidden-size", type=int, default=128)
    add("--layers", type=int, default=4)
    add("--experts", type=int, default=8, help="experts a layer (%(default)s)")
    add("--out", type=Path, default=Path("runs/routers"), help="where everything is written")
    add("--quick", action="store_true", help="a few steps of a tiny model, one seed")
    options = parser.parse_args()
    unknown = sorted(set(options.arms) - set(ARMS))
    if unknown:
        parser.error(f"no arm {unknown[0]!r}; use some of {'; '.join(ARMS)}")
    if options.quick:
        options.hidden_size, options.layers, options.experts = 32, 2, 4
        options.steps, options.seeds = 4, 1
    return options


def text_rows_of(folder: Path, quick: bool) -> str:  # noqa: FBT001
    """Make the rows if need be; where they are kept."""
    text_rows(folder, quick=quick)
    return str(folder / ("rows-quick.pt" if quick else "rows.pt"))


def run(name: str, seed: int, kept: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm with one seed."""
    arm = ARMS[name]
    rows = torch.load(kept)
    model = model_settings(
        options.hidden_size, options.layers, options.experts, int(rows["vocabulary"])
    )
    model |= {"router": arm.router, "router_fields": dict(arm.fields), "losses": dict(arm.losses)}
    model["experts_per_token"] = slots(arm.router, dict(arm.fields))
    recipe = Recipe(model=model, steps=options.steps, seed=seed)
    _, outcome = train(recipe, rows["train"], rows["heldout"])
    return asdict(outcome)


def table_of(results: Mapping[str, list[dict[str, Any]]], options: argparse.Namespace) -> Table:
    """One row an arm, the best mean perplexity first."""
    runs = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds"
    table = Table(title=f"{runs}, {options.steps} steps; mean +- half the range")
    table.add_column("")
    for heading in ("parameters", "perplexity", "beyond\nlinear", "s / run", *ROUTING.values()):
        table.add_column(heading, justify="right")
    outcomes = {name: [Outcome(**run) for run in runs] for name, runs in results.items()}
    for name in sorted(outcomes, key=lambda name: mean(run.perplexity for run in outcomes[name])):
        table.add_row(name, *cells_of(outcomes[name], outcomes.get(LINEAR, [])))
    return table


def cells_of(runs: list[Outcome], linear: list[Outcome]) -> list[str]:
    """Size, quality with its spread, cost, and what the router does."""
    values = [run.perplexity for run in runs]
    beyond = [run.perplexity - other.perplexity for run, other in zip(runs, linear, strict=False)]
    cells = [
        f"{runs[0].parameters:,}",
        spread_of(values),
        spread_of(beyond) if beyond and runs is not linear else "-",
        f"{mean(run.seconds for run in runs):.0f}",
    ]
    for key in ROUTING:
        seen = [run.routing[key] for run in runs if key in run.routing]
        cells.append(f"{mean(seen):.2f}" if seen else "-")
    return cells


def spread_of(values: list[float]) -> str:
    """The mean, and half the range."""
    return f"{mean(values):.2f} +- {(max(values) - min(values)) / 2:.2f}"


if __name__ == "__main__":
    main()
