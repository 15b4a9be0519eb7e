"""The command line of `python -m benchmarks.run`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.cases import OURS
from benchmarks.measure import Budget
from benchmarks.records import ROOT
from benchmarks.registry import BENCHMARKS
from benchmarks.running import CUDA_MODES
from benchmarks.shapes import DTYPES, OWN_SHAPE, ROUTINGS, expert_shape

__all__ = ["fill", "make_parser"]

MODES = ("fwd", "fwd_bwd", "mem", *CUDA_MODES)
RESULTS = ROOT / "benchmarks" / "results.csv"
GPU_SECONDS = 1.0
"""For the rounds of one row of the GPU suite."""
GPU_SLOW_SECONDS = 0.25
"""For the rounds of a peer that is no contender there."""
GPU_DEADLINE = 500.0
"""After which that suite begins no row: it is to take less than nine minutes."""


def _listed(kind: Callable[[str], object], allowed: Sequence[object] = ()):
    def parse(text: str) -> list[object]:
        values = [kind(part.strip()) for part in text.split(",")]
        for value in values:
            if allowed and value not in allowed:
                known = ", ".join(str(one) for one in allowed)
                raise argparse.ArgumentTypeError(f"unknown {value!r}; use some of {known}")
        return values

    return parse


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 1 on")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not a time")
    return value


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.run`; `fill` gives the defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = ", ".join(_known_shapes())
    add = parser.add_argument
    add("--suite", choices=("cpu", "gpu"), default="cpu", help="which rows are the default")
    add("--op", type=_listed(str, tuple(BENCHMARKS)), default=list(BENCHMARKS), metavar="NAMES")
    add("--modes", type=_listed(str, MODES), metavar="NAMES", help=", ".join(MODES))
    add("--shape", type=_listed(str), metavar="NAMES", help=f"{shapes}, 2048x768-E128k8")
    own = parser.add_argument_group("a layer of your own, all four together")
    own.add_argument("--hidden-size", type=_count, metavar="H")
    own.add_argument("--intermediate-size", type=_count, metavar="I", help="of one expert")
    own.add_argument("--experts", type=_count, metavar="E")
    own.add_argument("--top-k", type=_count, metavar="K")
    add("--tokens", type=_listed(_count), metavar="NUMBERS", help="T, such as 1,16,128,1024")
    add("--dtype", type=_listed(str, tuple(DTYPES)), metavar="NAMES", help=", ".join(DTYPES))
    add("--routing", type=_listed(str, ROUTINGS), metavar="NAMES", help=", ".join(ROUTINGS))
    add("--device", help="a torch device (default: that of the suite)")
    add("--threads", type=_count, help="of torch's CPU pool (default: torch's own choice)")
    add("--clock", choices=tuple(measure.CLOCKS), default="wall", help="cpu: with --threads 1")
    add("--rounds", type=_count, help="for every provider, instead of what fits --seconds")
    add("--seconds", type=_seconds, help="for the rounds of one row (4; suite gpu: 1)")
    add("--without", type=_listed(str, _peers()), default=[], metavar="NAMES", help="leave out")
    add("--deadline", type=_seconds, help="begin no row later than this (suite gpu: 500 s)")
    add("--plot", type=Path, metavar="FILE", help="throughput over T: .png, .svg or .pdf")
    add("--json", type=Path, metavar="FILE", help="write everything to this file")
    add("--csv", type=Path, metavar="FILE", default=RESULTS, help="where --append writes to")
    add("--append", action=argparse.BooleanOptionalAction, default=False, help="keep the rows")
    add("--check", action="store_true", help="exit with status 1 if a promise is missed")
    return parser


def _peers() -> tuple[str, ...]:
    names = {one.name: None for every in BENCHMARKS.values() for one in every.providers}
    return tuple(name for name in names if name != OURS)


def _known_shapes() -> list[str]:
    return sorted({name for one in BENCHMARKS.values() for name in one.shape_names})


def fill(options: argparse.Namespace) -> None:
    """Give what was not asked for the default of the suite.

    Args:
        options: Are changed.

    Raises:
        ValueError: a shape that there is not, or half of one.
    """
    sizes = (options.hidden_size, options.intermediate_size, options.experts, options.top_k)
    if any(sizes):
        if not all(sizes):
            raise ValueError(
                "a layer of your own takes all of --hidden-size, --intermediate-size, --experts "
                "and --top-k"
            )
        hidden, inner, experts, slots = sizes
        options.shape = [*(options.shape or []), f"{hidden}x{inner}-E{experts}k{slots}"]
    for name in options.shape or []:
        if OWN_SHAPE.fullmatch(name):
            expert_shape(name)
        elif name not in (known := _known_shapes()):
            listed = ", ".join(known)
            raise ValueError(f"unknown {name!r}; use some of {listed}, or sizes: 2048x768-E128k8")
    on_gpu = options.suite == "gpu"
    options.device = options.device or ("cuda" if on_gpu else "cpu")
    options.seconds = options.seconds or (GPU_SECONDS if on_gpu else Budget().seconds)
    options.slow_seconds = GPU_SLOW_SECONDS if on_gpu else Budget().slow_seconds
    options.deadline = options.deadline or (GPU_DEADLINE if on_gpu else math.inf)
    asked = [mode for mode in options.modes or () if mode in CUDA_MODES]
    if asked and torch.device(options.device).type != "cuda":
        raise ValueError(f"{', '.join(asked)}: this needs a CUDA device; give --suite gpu")
