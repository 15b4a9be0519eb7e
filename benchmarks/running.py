"""One case from its inputs to its records: answers checked first, then whatever the mode asks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks import device_checks, measure
from benchmarks.cases import AGAIN, OURS, Benchmark, Bound, Case, Inputs, Provider
from benchmarks.measure import Budget, ProviderError
from benchmarks.records import FAILED, Record
from benchmarks.shapes import COMPILE_SEEN_TOKENS, COMPILE_TOKENS

__all__ = ["CUDA_MODES", "Prepared", "broken", "prepare", "reference_answer", "run_case"]

NOTE_LETTERS = 160

CUDA_MODES = ("launches", "compiles", "graph")
OURS_ALONE = ("compiles", "graph")
"""Modes without the peers: they would compile for minutes, or break the capture for everyone."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the rows of one shape, T, dtype and routing share.

    Attributes:
        case: For which it was made.
        inputs: Of the case.
        wanted: The reference's answer, with the gradients where the case asks for them.
    """

    case: Case
    inputs: Inputs
    wanted: list[Tensor]

    def serves(self, case: Case) -> bool:
        """Tell whether another case has the same inputs and asks for no more of the answer."""
        enough = self.case.mode == "fwd_bwd" or case.mode != "fwd_bwd"
        return enough and replace(case, mode=self.case.mode) == self.case


def _answer_mode(case: Case) -> str:
    return "fwd_bwd" if case.mode == "fwd_bwd" else "fwd"


def reference_answer(benchmark: Benchmark, case: Case, inputs: Inputs) -> list[Tensor]:
    """What every provider must answer to the first batch: output and gradients, in float32.

    Args:
        benchmark: The op.
        case: Gives the mode.
        inputs: Of the case.
    """
    return measure.step(benchmark.reference(inputs), inputs, 0, _answer_mode(case))


def prepare(benchmark: Benchmark, case: Case) -> Prepared:
    """Draw the inputs of a case and compute the right answer."""
    inputs = benchmark.make_inputs(case)
    return Prepared(case, inputs, reference_answer(benchmark, case, inputs))


def run_case(
    benchmark: Benchmark, case: Case, budget: Budget, prepared: Prepared | None = None
) -> list[Record]:
    """Check every provider's answer, then measure.

    Args:
        benchmark: The op.
        case: What to measure.
        budget: How long it may take.
        prepared: Inputs and answer that serve the case; None makes them.

    Returns:
        One record per provider of this device; those that a rule skips, and those that raised, say
        so in `note`.
    """
    given = prepared or prepare(benchmark, case)
    bound, errors, first, others = _called(benchmark, case, given)
    gc.collect()
    if case.mode in ("fwd", "fwd_bwd"):
        paced = [p.name for p in benchmark.providers if p.checked and p.name in bound]
        records = _timed_records(given.inputs, case, budget, bound, first, paced)
    else:
        records = [
            _weighed(benchmark, case, name, one, given.inputs) for name, one in bound.items()
        ]
    return [*(replace(one, error=_error(one, errors)) for one in records), *others]


def _error(record: Record, errors: dict[str, float | None]) -> float | None:
    """What a mode found itself goes before the error of the first call."""
    own = OURS if record.provider == AGAIN else record.provider
    return errors[own] if record.error is None else record.error


def _called(
    benchmark: Benchmark, case: Case, given: Prepared
) -> tuple[dict[str, Bound], dict[str, float | None], dict[str, float], list[Record]]:
    """Call everyone once: bound providers, errors, seconds, and the records of those left out."""
    bound: dict[str, Bound] = {}
    errors: dict[str, float | None] = {}
    first: dict[str, float] = {}
    others: list[Record] = []
    for provider in benchmark.providers:
        name = provider.name
        if not provider.runs_on(case.device) or (case.mode in OURS_ALONE and name != OURS):
            continue
        if reason := provider.skip(case):
            others.append(_record(case, name, note=reason))
            continue
        try:
            ready = provider.bind(given.inputs)
            first[name], errors[name] = _first_call(provider, ready, given, case)
            bound[name] = ready
        except Exception as error:
            others.append(broken(case, name, error))
    return bound, errors, first, others


def _first_call(
    provider: Provider, bound: Bound, given: Prepared, case: Case
) -> tuple[float, float | None]:
    """Seconds of the first call that compiles nothing, and how wrong the answer is."""
    found: list[Tensor] = []
    mode = _answer_mode(case)
    if torch.device(case.device).type == "cuda":
        measure.step(bound, given.inputs, 0, mode)
    seconds = measure.seconds_of(
        lambda: found.extend(measure.step(bound, given.inputs, 0, mode)), case.device
    )
    if not provider.checked:
        return seconds, None
    wanted = given.wanted[:1] if mode == "fwd" else given.wanted
    return seconds, measure.error_of(found, wanted)


def _timed_records(
    inputs: Inputs,
    case: Case,
    budget: Budget,
    bound: dict[str, Bound],
    first: dict[str, float],
    paced: list[str],
) -> list[Record]:
    """Time all in turns; whoever raises is left out and the others begin anew."""
    failed: list[Record] = []
    bound, first = dict(bound), dict(first)
    if OURS in bound:
        bound[AGAIN], first[AGAIN] = bound[OURS], first[OURS]
    while set(paced) & set(bound):
        fair = [name for name in paced if name in bound]
        try:
            times = measure.interleave(bound, inputs, case, budget, first, fair)
        except ProviderError as failure:
            name = OURS if failure.provider == AGAIN else failure.provider
            failed.append(broken(case, name, failure.__cause__ or failure))
            for one in (name, AGAIN) if name == OURS else (name,):
                bound.pop(one, None)
            continue
        return [_timed(case, name, times, budget.clock) for name in bound] + failed
    return failed


def _timed(case: Case, name: str, times: dict[str, list[float]], clock: str) -> Record:
    own = [1e3 * seconds for seconds in times[name]]
    cuts = quantiles(own, n=10, method="inclusive") if len(own) > 1 else own * 9
    ratios = [ours / theirs for ours, theirs in zip(times.get(OURS, ()), times[name], strict=False)]
    return _record(
        case,
        name,
        clock=clock,
        rounds=len(own),
        p20_ms=cuts[1],
        p50_ms=median(own),
        p80_ms=cuts[7],
        ours_over_it=median(ratios) if ratios else None,
    )


def _weighed(benchmark: Benchmark, case: Case, name: str, bound: Bound, inputs: Inputs) -> Record:
    """Bytes, launches, new kernels or a captured call of one provider."""
    weigh: Callable[[], dict[str, object]] = {
        "mem": lambda: {
            "saved_bytes": measure.saved_bytes(bound, inputs),
            "peak_bytes": measure.peak_bytes(bound, inputs, case),
        },
        "launches": lambda: {
            "count": device_checks.count_launches(lambda: measure.step(bound, inputs, 0, "fwd"))
        },
        "compiles": lambda: {"count": _new_kernels(benchmark, case)},
        "graph": lambda: _captured(bound, inputs, case),
    }[case.mode]
    try:
        return _record(case, name, **weigh())
    except Exception as error:
        return broken(case, name, error)


def _new_kernels(benchmark: Benchmark, case: Case) -> int:
    """Kernels that are compiled over twenty T, forward and backward, after a few others."""

    def call(tokens: int) -> None:
        inputs = benchmark.make_inputs(replace(case, tokens=tokens))
        bound = benchmark.providers[0].bind(inputs)
        for mode in ("fwd", "fwd_bwd"):
            measure.step(bound, inputs, 0, mode)

    for tokens in COMPILE_SEEN_TOKENS:
        call(tokens)
    with device_checks.compiled_kernels() as names:
        for tokens in COMPILE_TOKENS:
            call(tokens)
    return len(names)


def _captured(bound: Bound, inputs: Inputs, case: Case) -> dict[str, object]:
    error, seconds = device_checks.replay(bound, inputs, case.device)
    times = sorted(1e3 * one for one in seconds)
    return {"error": error, "rounds": len(times), "p50_ms": median(times)}


def _record(case: Case, provider: str, **values: object) -> Record:
    identity = {key: value for key, value in asdict(case).items() if key != "device"}
    return Record(provider=provider, **identity, **values)  # pyright: ignore[reportArgumentType]


def broken(case: Case, provider: str, error: BaseException) -> Record:
    """A provider that raised: its record says what. Memory that it held is given back."""
    if torch.device(case.device).type == "cuda":
        torch.cuda.empty_cache()
    lines = str(error).strip().splitlines() or [""]
    told = f"{type(error).__name__}: {lines[0]}".strip(": ")
    return _record(case, provider, note=(FAILED + told)[:NOTE_LETTERS])
