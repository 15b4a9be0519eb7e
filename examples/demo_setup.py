"""The demo's command line, and what is made before an adapter can be trained."""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from demo_model import BaseSettings, make_checkpoint, pack
from demo_report import console
from demo_text import Split, split_files, standard_library_texts
from transformers import AutoTokenizer

CODE_PROMPT = "class Reader:\n\n    def __init__(self, "
# On the demo's own checkpoint, each arm's best of 1e-3, 3e-3, 6e-3, 1e-2 and 2e-2 after 160 steps,
# by the loss on training rows that were kept back for this.
OWN_RATES = {"LoRA": 6e-3, "MixLoRA": 1e-2}
RATE = 3e-4
QUICK_BASE = BaseSettings(
    vocab_size=384, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, steps=4
)


@dataclass(frozen=True)
class Job:
    """What both arms share; lengths in tokens, batches and rows in sequences."""

    base: str
    out: Path
    target: str
    prompt: str
    steps: int
    batch_size: int
    learning_rates: dict[str, float]  # by arm
    seed: int

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """Token rows (rows, tokens): "prose" and "target" held out, "target_train" to train on."""
        return torch.load(self.out / "rows.pt")


def prepare(description: str) -> Job:
    """Read the command line, make the base checkpoint if none is named, cut the texts into rows."""
    options = parse(description)
    options.out.mkdir(parents=True, exist_ok=True)
    prose, target = standard_library_texts(every=4 if options.quick else 1)
    tokenizer_texts = target.train
    if options.text:
        target = split_files(options.text)
    options.model_is_given = bool(options.model)
    if not options.model:
        settings = QUICK_BASE if options.quick else BaseSettings(seed=options.seed)
        options.model = str(
            in_new_process(make_checkpoint, options.out, settings, prose.train, tokenizer_texts)
        )
    count_rows(options, prose, target)
    return Job(
        base=options.model,
        out=options.out,
        target="your text" if options.text else "Python",
        prompt=target.heldout[0][:200] if options.text else CODE_PROMPT,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rates=learning_rates(options),
        seed=options.seed,
    )


def count_rows(options: argparse.Namespace, prose: Split, target: Split) -> None:
    """Cut every split into rows of tokens, save them, and say how many there are."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = {
        "prose": pack(tokenizer, prose.heldout, options.sequence_length)[: options.heldout_rows],
        "target": pack(tokenizer, target.heldout, options.sequence_length)[: options.heldout_rows],
        "target_train": pack(tokenizer, target.train, options.sequence_length),
    }
    torch.save(rows, options.out / "rows.pt")
    console.print(f"base checkpoint: {options.model}")
    console.print(
        f"tokens: {rows['target_train'].numel():,} of the target to train on; held out "
        f"{rows['target'].numel():,} of the target, {rows['prose'].numel():,} of prose"
    )


def learning_rates(options: argparse.Namespace) -> dict[str, float]:
    """The peak learning rate of each arm: what was asked for, else a default for the checkpoint."""
    if options.learning_rate is None and not options.model_is_given:
        return OWN_RATES
    return dict.fromkeys(OWN_RATES, options.learning_rate or RATE)


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh interpreter, so that its memory is its own.

    Its idle threads sleep instead of spinning (OpenMP reads this when torch is imported): where
    other programs use the cores too, small steps on two threads are ten times faster this way.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def parse(description: str) -> argparse.Namespace:
    """Options of the demo; `--quick` changes the defaults of the sizes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or hub id of a causal language model (default: make a small one)")
    add(
        "--text",
        nargs="+",
        type=Path,
        help="text files to fine-tune on; the last tenth is held out",
    )
    add("--out", type=Path, default=Path("runs/demo"), help="where everything is written")
    add("--quick", action="store_true", help="a few steps of a tiny model, to see that it runs")
    add("--steps", type=int, help="fine-tuning steps of each arm (256; quick: 24)")
    add("--batch-size", type=int, help="sequences a step (8; quick: 4)")
    add("--sequence-length", type=int, help="tokens a sequence (128; quick: 64)")
    add("--heldout-rows", type=int, help="held-out sequences of each text (256; quick: 4)")
    own = ", ".join(f"{name} {rate:g}" for name, rate in OWN_RATES.items())
    add("--learning-rate", type=float, help=f"of both arms ({own}; with --model: {RATE:g})")
    add("--seed", type=int, default=0, help="of everything (%(default)s)")
    options = parser.parse_args()
    defaults = {
        "steps": (256, 24),
        "batch_size": (8, 4),
        "sequence_length": (128, 64),
        "heldout_rows": (256, 4),
    }
    for name, (full, quick) in defaults.items():
        if vars(options)[name] is None:
            vars(options)[name] = quick if options.quick else full
    return options
