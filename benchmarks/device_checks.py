"""What a CUDA device alone can tell: launches of a call, new kernels over many T, capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.cases import Bound, Inputs
from benchmarks.measure import error_of, seconds_of

__all__ = ["Replayable", "compiled_kernels", "count_launches", "device_work", "replay"]

WARM_UPS = 3
REPLAYS = 30


def count_launches(call: Callable[[], object]) -> int:
    """Count what one call has the device do: kernels, copies and fills.

    Args:
        call: Is called twice, the second time under the profiler.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return device_work(seen.events() or ())


def device_work(events: Iterable[Any]) -> int:
    """Count the profiler's events that ran on the device; ranges that a user named are none."""
    return sum(
        event.device_type.name == "CUDA" and not event.is_user_annotation for event in events
    )


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """Collect the names of the Triton kernels that are specialised anew inside the block.

    One that lies in Triton's cache on disk counts too: the process had not seen it.
    """
    # by name: Triton is an optional part of the library
    runtime: Any = import_module("triton").knobs.runtime
    names: list[str] = []
    before = runtime.jit_post_compile_hook

    def note(**told: Any) -> None:
        names.append(told["fn"].name)

    runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = before


class Replayable(Protocol):
    """A captured call, such as `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Run it again on what lies in its inputs now."""
        ...


def capture_on_device(call: Callable[[], Tensor]) -> tuple[Replayable, Tensor]:
    """Capture a call in a CUDA graph, and give the graph with the tensor that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph, output


def replay(
    bound: Bound,
    inputs: Inputs,
    device: str,
    capture: Callable[[Callable[[], Tensor]], tuple[Replayable, Tensor]] = capture_on_device,
) -> tuple[float, list[float]]:
    """Capture the forward of one batch, put another batch in its place and replay.

    Args:
        bound: What to capture.
        inputs: At least two batches; what the first holds is put back in the end.
        device: A torch device.
        capture: Makes the graph.

    Returns:
        The error of the replayed answer against a plain call, and seconds of each replay.
    """
    first, second = inputs.batches[:2]
    kept = {name: tensor.detach().clone() for name, tensor in first.items()}
    with torch.no_grad():
        graph, output = capture(lambda: bound.run(0))
        try:
            for name, tensor in first.items():
                tensor.copy_(second[name])
            graph.replay()
            error = error_of([output], [bound.run(1)])
            seconds = [seconds_of(graph.replay, device) for _ in range(REPLAYS)]
        finally:
            for name, tensor in first.items():
                tensor.copy_(kept[name])
    return error, seconds
