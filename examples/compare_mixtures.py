"""Compare every mixture of LoRA with plain LoRA at the same number of trainable parameters.

    python examples/compare_mixtures.py                    # all methods, three seeds
    python examples/compare_mixtures.py --methods mixlora,smora --seeds 1

The task has two domains at once, English prose and Python source of the standard library, on the
demo's own small checkpoint. Every arm sees the same rows in the same order, and takes the better of
two learning rates by its loss on training rows that were kept back. Methods that mix adapters get
two of half the rank, each trained alone on its own domain for half of the steps, and then train
their router. Each run has a process of its own.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import torch
from compare_arms import ARMS, PLAIN, Arm, build, rank_for, train_experts, trainable
from compare_training import Domains, Recipe, fit, loss_on, step_ratio, usage_of
from demo_model import BaseSettings, make_checkpoint, pack
from demo_report import console, peak_memory
from demo_setup import QUICK_BASE, in_new_process
from demo_text import standard_library_texts
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

NAMES = ("prose", "Python")
KEPT_BACK, HELD_OUT = 32, 128
RATES = (3e-3, 1e-2)
WIDTH = 130


def main() -> None:
    """Prepare, run every arm, show the table."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    base = in_new_process(prepare, options)
    results = {}
    for name in (PLAIN, *options.methods):
        start = time.perf_counter()
        results[name] = run_arm(name, base, options)
        console.print(f"{name}: {time.perf_counter() - start:.0f} s", highlight=False)
        (options.out / "results.json").write_text(json.dumps(results, indent=2))
    shown = console if console.is_terminal else Console(width=WIDTH)
    shown.print(table_of(results, options))


def parse() -> argparse.Namespace:
    """Options; `--quick` changes the defaults of the sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", type=lambda text: text.split(","), default=list(ARMS), metavar="NAMES")
    add("--seeds", type=int, default=3, help="runs of every arm (%(default)s)")
    add("--steps", type=int, default=120, help="training steps (%(default)s)")
    add("--batch-size", type=int, default=8, help="rows a step (%(default)s)")
    add("--rank", type=int, default=32, help="of plain LoRA: the budget of all (%(default)s)")
    add("--out", type=Path, default=Path("runs/compare"), help="where everything is written")
    add("--quick", action="store_true", help="a few steps of a tiny model, to see that it runs")
    options = parser.parse_args()
    unknown = sorted(set(options.methods) - set(ARMS))
    if unknown:
        parser.error(f"no arm {unknown[0]!r}; use some of {', '.join(ARMS)}")
    if options.quick:
        options.seeds, options.steps, options.rank = 1, 4, 16
    return options


def prepare(options: argparse.Namespace) -> str:
    """Make the base checkpoint, or find it, and cut both domains into rows."""
    prose, code = standard_library_texts(every=4 if options.quick else 1)
    settings = QUICK_BASE if options.quick else BaseSettings()
    base = make_checkpoint(options.out, settings, prose.train, code.train)
    tokenizer = AutoTokenizer.from_pretrained(base)
    length = settings.sequence_length
    train = [pack(tokenizer, split.train, length) for split in (prose, code)]
    shown = 4 if options.quick else HELD_OUT
    heldout = [pack(tokenizer, split.heldout, length)[:shown] for split in (prose, code)]
    rows = {
        "names": NAMES,
        "train": tuple(rows[KEPT_BACK:] for rows in train),
        "kept_back": tuple(rows[:KEPT_BACK] for rows in train),
        "heldout": tuple(heldout),
    }
    torch.save(rows, options.out / "rows.pt")
    return str(base)


def run_arm(name: str, base: str, options: argparse.Namespace) -> list[dict]:
    """Every seed of one arm: the first tries the rates, the others take the best."""
    rank = in_new_process(rank_of, name, base, options)
    tried = [in_new_process(run, name, base, rank, rate, 0, options) for rate in RATES]
    best = min(tried, key=lambda result: result["kept_back"])
    others = [
        in_new_process(run, name, base, rank, best["rate"], seed, options)
        for seed in range(1, options.seeds)
    ]
    return [best, *others]


def rank_of(name: str, base: str, options: argparse.Namespace) -> int:
    """The rank that meets the budget; adapters to be mixed share it."""
    if name == PLAIN:
        return options.rank
    if ARMS[name].mixes:
        return options.rank // len(NAMES)
    return rank_for(name, base, trainable(build(PLAIN, base, options.rank, {})))


def run(
    name: str, base: str, rank: int, rate: float, seed: int, options: argparse.Namespace
) -> dict:
    """Train and measure one arm with one seed."""
    domains = Domains.load(options.out / "rows.pt")
    arm = ARMS.get(name, Arm())
    recipe = Recipe(options.steps, options.batch_size, rate, seed, arm.labelled)
    experts = {}
    if arm.mixes:
        alone = Recipe(options.steps // 2, options.batch_size, rate, seed)
        folder = options.out / "experts"
        experts = in_new_process(train_experts, base, rank, domains, alone, folder)
    torch.manual_seed(seed)
    model = build(name, base, rank, experts)
    parameters = trainable(model)
    if arm.mixes:
        parameters += 2 * trainable(build(PLAIN, base, rank, {}))
    before = peak_memory()
    fit(model, domains, recipe, by_policy=arm.by_policy)
    memory = peak_memory() - before
    losses = [loss_on(model, rows, task) for task, rows in enumerate(domains.heldout)]
    kept_back = mean(loss_on(model, rows, task) for task, rows in enumerate(domains.kept_back))
    ratio = None
    if trainable(model):
        plain = build(PLAIN, base, options.rank, {})
        ratio = step_ratio(model, plain, domains, recipe, by_policy=arm.by_policy)
    return {
        "rate": rate,
        "rank": rank,
        "parameters": parameters,
        "losses": losses,
        "kept_back": kept_back,
        "step": ratio,
        "memory": memory,
        "usage": usage_of(model, torch.cat(domains.heldout)[: 2 * HELD_OUT]),
    }


def table_of(results: dict[str, list[dict]], options: argparse.Namespace) -> Table:
    """One row an arm, the best mean loss first."""
    table = Table(title=f"{options.seeds} seeds, {options.steps} steps; mean +- half the range")
    headings = ("", "parameters", "rate", *(f"{name}, nats" for name in NAMES), "step / LoRA's")
    for heading in (*headings, "memory, MB", "experts a token", "in use"):
        table.add_column(heading, justify="right" if heading else "left")
    order = sorted(results, key=lambda name: mean(mean(run["losses"]) for run in results[name]))
    for name in order:
        runs = results[name]
        table.add_row(name, f"{runs[0]['parameters']:,}", f"{runs[0]['rate']:g}", *cells_of(runs))
    return table


def cells_of(runs: list[dict]) -> list[str]:
    """Losses with their spread, then what training costs, then what the router does."""
    cells = []
    for task in range(len(NAMES)):
        losses = [run["losses"][task] for run in runs]
        cells.append(f"{mean(losses):.3f} +- {(max(losses) - min(losses)) / 2:.3f}")
    steps = [run["step"] for run in runs if run["step"]]
    cells.append(f"{mean(steps):.2f}" if steps else "-")
    cells.append(f"{runs[0]['memory'] / 1e6:,.0f}")
    for place in range(2):
        used = [run["usage"][place] for run in runs if run["usage"]]
        cells.append(f"{mean(used):.2f}" if used else "-")
    return cells


if __name__ == "__main__":
    main()
