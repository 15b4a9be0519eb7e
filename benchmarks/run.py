"""Time and weigh the ops beside their baselines, in one process and in turns.

python -m benchmarks.run                                # every default row, about ten minutes
python -m benchmarks.run --suite gpu                    # layers of released models, on CUDA
python -m benchmarks.run --op gated_lora --modes fwd_bwd --dtype fp32
python -m benchmarks.run --shape qwen3-30b-a3b --tokens 1,64 --routing zipf --device cuda
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.cases import OURS, Benchmark, Case, select_cases
from benchmarks.floors import judge, rows_of
from benchmarks.gpu_floors import judge_gpu
from benchmarks.gpu_suite import gpu_cases
from benchmarks.layer_floors import judge_layers
from benchmarks.measure import Budget
from benchmarks.options import fill, make_parser
from benchmarks.plot import plot_throughput
from benchmarks.records import Record, Stamp, append_csv, stamp, write_json
from benchmarks.registry import BENCHMARKS
from benchmarks.report import print_report
from benchmarks.roofline import Ceiling, ceilings, limits
from benchmarks.running import CUDA_MODES, Prepared, broken, prepare, run_case
from benchmarks.shapes import ROUTINGS
from moeroute.integration.plot import check_plot

__all__ = ["main"]

WIDTH = 176


def _cases(options: argparse.Namespace) -> list[Case]:
    suite = None
    if options.suite == "gpu":
        on_cuda = torch.device(options.device).type == "cuda"
        every = gpu_cases(options.device)
        suite = [case for case in every if on_cuda or case.mode not in CUDA_MODES]
    found = []
    for name in options.op:
        benchmark = BENCHMARKS[name]
        known = options.shape and [one for one in options.shape if benchmark.knows(one)]
        if options.shape and not known:
            continue
        own = benchmark.cases(options.device)
        found += select_cases(
            own if suite is None else [case for case in suite if case.op == name],
            modes=options.modes,
            shapes=known,
            tokens=options.tokens,
            dtypes=options.dtype,
            routings=options.routing,
        )
    places = {case: place for place, case in enumerate(suite or ())}
    return sorted(found, key=lambda case: places.get(case, len(places)))


@dataclass(frozen=True, slots=True)
class Run:
    """How the rows of a run are made.

    Attributes:
        budget: Of a row.
        until: `time.monotonic()` after which no row begins.
        keep: Takes the records of a row as soon as it is done.
        console: Where progress is told.
        without: Names of providers that are left out.
    """

    budget: Budget
    until: float
    keep: Callable[[list[Record]], None]
    console: Console
    without: Sequence[str] = ()

    def all(self, cases: Sequence[Case]) -> list[Record]:
        """Run the cases in their order, as many as time allows."""
        records: list[Record] = []
        prepared: Prepared | None = None
        done: list[Record] = []
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        with bar as progress:
            task = progress.add_task("", total=len(cases))
            for number, case in enumerate(cases):
                if time.monotonic() > self.until:
                    self._stop(len(cases) - number, "time is up")
                    break
                self._tell(progress, task, f"{number + 1}/{len(cases)} {_label(case)}")
                if prepared is None or not prepared.serves(case):
                    # gone before the next inputs are made: one layer may fill half a device
                    prepared = None
                    gc.collect()
                    prepared, done = _prepared(case)
                if prepared is not None:
                    done = run_case(self._benchmark(case), case, self.budget, prepared)
                self.keep(done)
                records += done
                progress.advance(task)
                if any(record.failed for record in done) and (dead := _dead(case.device)):
                    self._stop(len(cases) - number - 1, f"the device answers no more: {dead}")
                    break
        return records

    def _benchmark(self, case: Case) -> Benchmark:
        whole = BENCHMARKS[case.op]
        kept = tuple(one for one in whole.providers if one.name not in self.without)
        return replace(whole, providers=kept)

    def _tell(self, progress: Progress, task: TaskID, label: str) -> None:
        progress.update(task, description=label.partition(" ")[2])
        if not self.console.is_terminal:
            self.console.print(label, highlight=False)

    def _stop(self, left: int, reason: str) -> None:
        self.console.print(f"stopped, {reason}: {left} rows were not run", highlight=False)


def _prepared(case: Case) -> tuple[Prepared | None, list[Record]]:
    """Inputs and answer of a case, or the record that says why there are none."""
    try:
        return prepare(BENCHMARKS[case.op], case), []
    except RuntimeError as error:
        return None, [broken(case, OURS, error)]


def _label(case: Case) -> str:
    skew = "" if case.routing == ROUTINGS[0] else f" {case.routing}"
    return f"{case.op} {case.mode} {case.shape_name} T={case.tokens} {case.dtype}{skew}"


def _dead(device: str) -> str:
    """What a device says that a broken kernel has taken down for good, or ""."""
    if torch.device(device).type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            return str(error).strip().splitlines()[0]
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the name of the program; None takes those of the process.

    Returns:
        Exit status: 1 where --check is given and a promise is missed, 2 where no row fits, else 0.
    """
    begun = time.monotonic()
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    cases = _cases(options)
    if not cases:
        console.print("no row has this op, mode and shape; see --help for the names")
        return 2
    console.print(f"{len(cases)} rows at about {options.seconds:g} s each, and the first calls")
    made = stamp(options.device)
    # before the rows: a device may not answer any more after them
    most = ceilings((case.dtype for case in cases), options.device)
    budget = Budget(
        options.seconds, options.slow_seconds, exact=options.rounds, clock=options.clock
    )
    until, keep = begun + options.deadline, _keeper(options, made)
    run = Run(budget, until, keep, console, options.without)
    return _report(options, console, run.all(cases), made, most)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    options = parser.parse_args(arguments)
    try:
        fill(options)
        if options.plot:
            check_plot(options.plot)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and torch sees none; --device cpu runs on the CPU")
    return options


def _keeper(options: argparse.Namespace, made: Stamp) -> Callable[[list[Record]], None]:
    """Write each row as soon as it is done, so that a run that is killed keeps what it has."""
    if not options.append:
        return lambda done: None
    append_csv(options.csv, [], made)  # a file with other columns is told before the first row
    return lambda done: append_csv(options.csv, done, made)


def _report(
    options: argparse.Namespace,
    console: Console,
    records: list[Record],
    made: Stamp,
    most: Mapping[str, Ceiling],
) -> int:
    rows = rows_of(records)
    verdicts = [*judge(records), *judge_layers(rows), *judge_gpu(rows, most)]
    floor = limits(rows, most)
    print_report(console, records, made, verdicts, floor)
    if options.append:
        console.print(f"appended {len(records)} rows to {options.csv.name}")
    if options.plot:
        plot_throughput(rows, floor, options.plot, title=made.device)
        console.print(f"wrote {options.plot.name}", highlight=False)
    if options.json:
        write_json(options.json, records, made, [verdict.line for verdict in verdicts])
    return int(options.check and any(verdict.kept is False for verdict in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
