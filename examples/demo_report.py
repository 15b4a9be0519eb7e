"""What the demo shows: progress bars, the results as a table, a sentence from its figures."""

import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers import TrainerCallback

from moeroute.methods import MixLoRA

transformers.logging.disable_progress_bar()  # the demo has its own
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's concern
console = Console()
LEVEL = 0.005  # nats per token; smaller gaps are called level


@dataclass(frozen=True)
class Result:
    """What one arm of the comparison measured.

    Losses are mean nats per held-out token, before and after training; memory is in bytes.
    """

    name: str
    adapter: str
    learning_rate: float
    trainable_parameters: int
    target: tuple[float, float]
    prose: tuple[float, float]
    tokens_per_second: float
    memory_before: int
    memory_peak: int


@contextmanager
def progress_bar(title: str, steps: int) -> Iterator[Callable[[str], None]]:
    """Show a bar; the value is a function to call after each step, with a short note."""
    columns = (
        TextColumn(f"{title:<16}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, note="")
        yield lambda note: progress.update(task, advance=1, note=note)


class TrainerBar(TrainerCallback):
    """The same bar for `transformers.Trainer`, with the last logged loss as its note."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.note = ""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress_bar(self.title, state.max_steps)
        self.advance = self.bar.__enter__()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"
            if "moe/entropy" in logs:
                self.note += f"  routing entropy {logs['moe/entropy']:.2f}"

    def on_step_end(self, args, state, control, **kwargs):
        self.advance(self.note)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.__exit__(None, None, None)


def peak_memory() -> int:
    """Peak bytes: of the CUDA device if there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path(
        "/proc/self/status"
    )  # counts from exec on, unlike ru_maxrss, which a child inherits
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(adapter: MixLoRA | LoraConfig) -> str:
    """The size of an adapter, in a table's cell."""
    if isinstance(adapter, MixLoRA):
        return f"{adapter.num_experts} experts, top {adapter.top_k}, r={adapter.r}"
    return f"r={adapter.r}"


def results_table(arms: list[Result], target: str) -> Table:
    """One column an arm; losses in nats per token."""
    table = Table(title="LoRA and MixLoRA of equal size (losses in nats per token)", min_width=70)
    table.add_column("")
    for arm in arms:
        table.add_column(arm.name, justify="right")
    rows = {
        "adapter": lambda arm: arm.adapter,
        "trainable parameters": lambda arm: f"{arm.trainable_parameters:,}",
        "learning rate": lambda arm: f"{arm.learning_rate:g}",
        f"held-out {target}, before": lambda arm: f"{arm.target[0]:.4f}",
        f"held-out {target}, after": lambda arm: f"{arm.target[1]:.4f}",
        "held-out prose, before": lambda arm: f"{arm.prose[0]:.4f}",
        "held-out prose, after": lambda arm: f"{arm.prose[1]:.4f}",
        "training tokens per second": lambda arm: f"{arm.tokens_per_second:,.0f}",
        "peak memory, MB": lambda arm: f"{arm.memory_peak / 1e6:,.0f}",
        "of that before training, MB": lambda arm: f"{arm.memory_before / 1e6:,.0f}",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(arm) for arm in arms))
    return table


def verdict(lora: Result, mixture: Result, target: str) -> str:
    """Say which arm did better, from the figures alone."""
    gap = lora.target[1] - mixture.target[1]
    winner, loser = ("MixLoRA", "LoRA") if gap > 0 else ("LoRA", "MixLoRA")
    first = f"{winner} beats {loser} by {abs(gap):.4f} nats per token"
    if abs(gap) < LEVEL:
        first = f"LoRA and MixLoRA are level, {abs(gap):.4f} nats per token apart"
    moved = [arm.prose[1] - arm.prose[0] for arm in (lora, mixture)]
    speed = mixture.tokens_per_second / lora.tokens_per_second
    return (
        f"On held-out {target} {first}. The loss on prose, on which neither was trained here, "
        f"moved by {moved[0]:+.4f} (LoRA) and {moved[1]:+.4f} (MixLoRA). MixLoRA trained "
        f"{speed:.2f} times as fast as LoRA. One seed of one small model shows that the "
        "parts work together, not which method is better."
    )
