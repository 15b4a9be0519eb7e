"""How one case is measured: answers checked, then interleaved rounds, or bytes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.cases import AGAIN, OURS, Bound, Case, Inputs

__all__ = [
    "CLOCKS",
    "Budget",
    "ProviderError",
    "error_of",
    "interleave",
    "peak_bytes",
    "rounds_for",
    "saved_bytes",
    "seconds_of",
    "step",
]

JUDGED = (OURS, AGAIN)
SLOW = 4.0
"""A provider this many times slower than the fastest one is no contender: it gets fewer rounds."""


CLOCKS: Mapping[str, Callable[[], float]] = MappingProxyType(
    {"wall": time.perf_counter, "cpu": time.process_time}
)
"""Wall time, or the process's own time on the processor: for a busy machine, with one thread."""


class ProviderError(Exception):
    """A provider broke down while it was timed.

    Attributes:
        provider: Its name.
    """

    def __init__(self, provider: str) -> None:
        super().__init__(provider)
        self.provider = provider


@dataclass(frozen=True, slots=True)
class Budget:
    """How long one row may take, and by which clock.

    Attributes:
        seconds: For the rounds of the contenders of a row.
        slow_seconds: For the rounds of each provider that is no contender.
        least: Rounds of a contender, however slow.
        most: Rounds of anyone, however fast.
        exact: Rounds of everyone instead of all this, or None.
        clock: Key of `CLOCKS`; a GPU has its own.
    """

    seconds: float = 4.0
    slow_seconds: float = 2.0
    least: int = 7
    most: int = 101
    exact: int | None = None
    clock: str = "wall"


def step(bound: Bound, inputs: Inputs, index: int, mode: str) -> list[Tensor]:
    """Call a provider once, as the mode asks.

    Args:
        bound: The provider.
        inputs: Give the gradient of the output.
        index: Which batch.
        mode: "fwd" for the answer alone, else the gradients of all leaves too.

    Returns:
        The output, then the gradients in the order of the leaves.
    """
    if mode == "fwd":
        with torch.no_grad():
            return [bound.run(index)]
    output = bound.run(index)
    leaves = list(bound.leaves(index).values())
    gradient = inputs.gradients[index] if bound.gradient is None else bound.gradient
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def error_of(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The greatest relative Frobenius error of any output or gradient; NaN counts as infinite."""
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        scale = other.double().norm().item()
        error = (one.double() - other.double()).norm().item() / max(scale, 1e-30)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def seconds_of(call: Callable[[], object], device: str, clock: str = "wall") -> float:
    """How long a call takes, the device's own work included.

    Args:
        call: What to time.
        device: A torch device; CUDA events time a GPU.
        clock: Key of `CLOCKS`, for a CPU.
    """
    if torch.device(device).type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = CLOCKS[clock]()
    call()
    return CLOCKS[clock]() - begin


def rounds_for(
    estimates: Mapping[str, float], budget: Budget, judged: Collection[str], paced: Collection[str]
) -> dict[str, int]:
    """Give every provider its number of rounds.

    Args:
        estimates: Seconds of one call, by provider.
        budget: Of the row.
        judged: Providers that are contenders however slow they are.
        paced: Providers among which the fastest one is sought.

    Returns:
        Rounds by provider: the same for all contenders.
    """
    if budget.exact is not None:
        return dict.fromkeys(estimates, budget.exact)
    limit = SLOW * min(estimates[name] for name in paced)
    contenders = {name for name, value in estimates.items() if name in judged or value <= limit}
    total = sum(estimates[name] for name in contenders)
    shared = min(budget.most, max(budget.least, int(budget.seconds / total)))
    return {
        name: shared
        if name in contenders
        else min(shared, max(1, int(budget.slow_seconds / value)))
        for name, value in estimates.items()
    }


def interleave(
    providers: dict[str, Bound],
    inputs: Inputs,
    case: Case,
    budget: Budget,
    first: dict[str, float],
    paced: Collection[str],
) -> dict[str, list[float]]:
    """Time all providers in turns: each round calls each once on the same batch, in a new order.

    The order is shuffled rather than rotated, so that nobody always runs behind the same neighbour.

    Args:
        providers: Already called once, by name.
        inputs: Shared.
        case: Gives mode and device.
        budget: Of the row.
        first: Seconds of each provider's first call, which decides who is worth a second look.
        paced: Ours and the peers, by name.

    Returns:
        Seconds per round, by provider; round i of one stands beside round i of another.

    Raises:
        ProviderError: one of them raised; its error is the cause.
    """
    sets = len(inputs.batches)

    def timed(name: str, index: int) -> float:
        try:
            return seconds_of(
                lambda: step(providers[name], inputs, index, case.mode), case.device, budget.clock
            )
        except Exception as error:
            raise ProviderError(name) from error

    # A call that took long and four times the fastest one's time is its own estimate.
    limit = max(SLOW * min(first[name] for name in paced), budget.slow_seconds / 2)
    warm = (name for name in providers if name in JUDGED or first[name] <= limit)
    estimates = {**first, **{name: timed(name, 0) for name in warm}}
    rounds = rounds_for(estimates, budget, JUDGED, paced)
    times: dict[str, list[float]] = {name: [] for name in providers}
    shuffle = random.Random(0).sample
    for turn in range(max(rounds.values())):
        names = [name for name in providers if turn < rounds[name]]
        for name in shuffle(names, len(names)):
            times[name].append(timed(name, turn % sets))
    return times


def saved_bytes(bound: Bound, inputs: Inputs) -> int:
    """Bytes that a forward keeps alive for backward, beyond the weights.

    Every distinct storage counts once and whole, the tokens' own included; the weights are there
    anyway and do not count.
    """
    kept: dict[int, int] = {}
    free = {tensor.untyped_storage().data_ptr() for tensor in inputs.weights.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = bound.run(0)
    total = sum(kept.values())
    del output
    return total


def peak_bytes(bound: Bound, inputs: Inputs, case: Case) -> int:
    """The most bytes that forward + backward hold at once, beyond the inputs.

    CUDA: the caching allocator's peak. CPU: the running sum of what torch's allocator gave out and
    took back, read from the profiler; buffers of libraries below torch are not in it.
    """
    if torch.device(case.device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(bound, inputs, 0, "fwd_bwd")
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it greets on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = step(bound, inputs, 0, "fwd_bwd")
    del kept
    # torch has no public way to this list; its profiler's own tables hold net changes, no peak.
    events: list[Any] = profile.kineto_results.events()  # pyright: ignore
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
