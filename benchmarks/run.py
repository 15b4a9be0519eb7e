"""Time and weigh the ops beside their baselines, in one process and in turns.

python -m benchmarks.run                                # every default row, about ten minutes
python -m benchmarks.run --suite gpu                    # layers of released models, on CUDA
python -m benchmarks.run --op gated_lora --modes fwd_bwd --dtype fp32
python -m benchmarks.run --shape qwen3-30b-a3b --tokens 1,64 --routing zipf --device cuda
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import measure
from benchmarks.cases import AGAIN, OURS, Benchmark, Bound, Case, Inputs, Provider, select_cases
from benchmarks.floors import judge, rows_of
from benchmarks.gpu_floors import judge_gpu
from benchmarks.measure import Budget
from benchmarks.options import fill, make_parser
from benchmarks.records import Record, append_csv, stamp, write_json
from benchmarks.registry import BENCHMARKS
from benchmarks.report import print_report
from benchmarks.roofline import limits
from benchmarks.shapes import GPU_SHAPES, GPU_SUITE_TOKENS

__all__ = ["main", "reference_answer", "run_case"]

WIDTH = 176


def _record(case: Case, provider: str, **values: object) -> Record:
    identity = {key: value for key, value in asdict(case).items() if key != "device"}
    return Record(provider=provider, **identity, **values)  # pyright: ignore[reportArgumentType]


def reference_answer(benchmark: Benchmark, case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """What every provider must answer to the first batch: output and gradients, in float32.

    Args:
        benchmark: The op.
        case: Gives the mode.
        inputs: Of the case.
    """

    def run(index: int) -> torch.Tensor:
        return benchmark.reference(inputs.weights, inputs.batches[index])

    mode = "fwd" if case.mode == "mem" else case.mode
    return measure.step(Bound(run, inputs.leaves), inputs, 0, mode)


def run_case(benchmark: Benchmark, case: Case, budget: Budget) -> list[Record]:
    """Check every provider's answer, then measure.

    Args:
        benchmark: The op.
        case: What to measure.
        budget: How long it may take.

    Returns:
        One record per provider; those that a rule skips say so in `note`.
    """
    inputs = benchmark.make_inputs(case)
    wanted = reference_answer(benchmark, case, inputs)
    bound: dict[str, Bound] = {}
    errors: dict[str, float | None] = {}
    first: dict[str, float] = {}
    skipped: list[Record] = []
    for provider in benchmark.providers:
        if reason := provider.skip(case):
            skipped.append(_record(case, provider.name, note=reason))
            continue
        bound[provider.name] = provider.bind(inputs)
        seconds, error = _first_call(provider, bound[provider.name], inputs, case, wanted)
        first[provider.name], errors[provider.name] = seconds, error
    del wanted
    gc.collect()
    if case.mode == "mem":
        measured = [
            _record(
                case,
                name,
                error=errors[name],
                saved_bytes=measure.saved_bytes(one, inputs),
                peak_bytes=measure.peak_bytes(one, inputs, case),
            )
            for name, one in bound.items()
        ]
        return measured + skipped
    bound[AGAIN], errors[AGAIN], first[AGAIN] = bound[OURS], errors[OURS], first[OURS]
    paced = [p.name for p in benchmark.providers if p.checked and p.name in bound]
    times = measure.interleave(bound, inputs, case, budget, first, paced)
    return [_timed(case, name, times, errors[name], budget.clock) for name in bound] + skipped


def _first_call(
    provider: Provider, bound: Bound, inputs: Inputs, case: Case, wanted: list[torch.Tensor]
) -> tuple[float, float | None]:
    """Seconds of the first call, warm-up included, and how wrong its answer is."""
    mode = "fwd" if case.mode == "mem" else case.mode
    found: list[torch.Tensor] = []
    seconds = measure.seconds_of(
        lambda: found.extend(measure.step(bound, inputs, 0, mode)), case.device
    )
    return seconds, measure.error_of(found, wanted) if provider.checked else None


def _timed(
    case: Case, name: str, times: dict[str, list[float]], error: float | None, clock: str
) -> Record:
    own = [1e3 * seconds for seconds in times[name]]
    cuts = quantiles(own, n=10, method="inclusive") if len(own) > 1 else own * 9
    ratios = [ours / theirs for ours, theirs in zip(times[OURS], times[name], strict=False)]
    return _record(
        case,
        name,
        clock=clock,
        rounds=len(own),
        p20_ms=cuts[1],
        p50_ms=median(own),
        p80_ms=cuts[7],
        ours_over_it=median(ratios),
        error=error,
    )


def _cases(options: argparse.Namespace) -> list[Case]:
    found = []
    for name in options.op:
        benchmark = BENCHMARKS[name]
        shapes, tokens = options.shape, options.tokens
        if options.suite == "gpu" and name == "routed_mlp":
            shapes, tokens = shapes or list(GPU_SHAPES), tokens or list(GPU_SUITE_TOKENS)
        known = shapes and [one for one in shapes if benchmark.knows(one)]
        if shapes and not known:
            continue
        found += select_cases(
            benchmark.cases(options.device),
            modes=options.modes,
            shapes=known,
            tokens=tokens,
            dtypes=options.dtype,
            routings=options.routing,
        )
    return found


def _run_all(cases: Sequence[Case], budget: Budget, console: Console) -> list[Record]:
    records: list[Record] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for number, case in enumerate(cases, 1):
            label = f"{case.op} {case.mode} {case.shape_name} T={case.tokens} {case.dtype}"
            progress.update(task, description=label)
            if not console.is_terminal:
                console.print(f"{number}/{len(cases)} {label}", highlight=False)
            records += run_case(BENCHMARKS[case.op], case, budget)
            progress.advance(task)
            gc.collect()
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the name of the program; None takes those of the process.

    Returns:
        Exit status: 1 where --check is given and a promise is missed, 2 where no row fits, else 0.
    """
    parser = make_parser(__doc__)
    options = parser.parse_args(arguments)
    try:
        fill(options)
    except ValueError as error:
        parser.error(str(error))
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and torch sees none; --device cpu runs on the CPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    cases = _cases(options)
    if not cases:
        console.print("no row has this op, mode and shape; see --help for the names")
        return 2
    budget = Budget(seconds=options.seconds, exact=options.rounds, clock=options.clock)
    made = stamp(options.device)
    records = _run_all(cases, budget, console)
    verdicts = [*judge(records), *judge_gpu(rows_of(records))]
    print_report(console, records, made, verdicts, limits(rows_of(records), options.device))
    if options.append:
        append_csv(options.csv, records, made)
        console.print(f"appended {len(records)} rows to {options.csv.name}")
    if options.json:
        write_json(options.json, records, made, [verdict.line for verdict in verdicts])
    return int(options.check and any(verdict.kept is False for verdict in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
