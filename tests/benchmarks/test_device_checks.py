"""Launches, new kernels and replays are counted as they are said to be."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import device_checks
from benchmarks.cases import Bound, Inputs
from benchmarks.device_checks import compiled_kernels, device_work, replay


def event(device: str, *, named: bool = False) -> SimpleNamespace:
    return SimpleNamespace(device_type=SimpleNamespace(name=device), is_user_annotation=named)


def test_only_what_the_device_did_is_counted():
    events = [event("CPU"), event("CUDA"), event("CUDA"), event("CUDA", named=True)]
    assert device_work(events) == 2


def test_the_profilers_own_events_have_what_is_read():
    with torch.autograd.profiler.profile() as seen:
        torch.ones(2) + 1
    events = list(seen.function_events or ())
    assert events
    assert device_work(events) == 0


def test_a_kernel_that_is_compiled_is_told_and_the_hook_is_put_back():
    runtime = pytest.importorskip("triton").knobs.runtime
    before = runtime.jit_post_compile_hook
    with compiled_kernels() as names:
        runtime.jit_post_compile_hook(fn=SimpleNamespace(name="up"), key="", repr="")
    assert names == ["up"]
    assert runtime.jit_post_compile_hook is before


def doubled(inputs: Inputs) -> Bound:
    return Bound(lambda index: inputs.batches[index]["x"] * 2, inputs.leaves)


class Graph:
    """Runs the call again, into the tensor that it wrote first, as a CUDA graph does."""

    def __init__(self, call, output: Tensor) -> None:
        self.call, self.output, self.replays = call, output, 0

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.call())


def make_inputs() -> Inputs:
    batches = tuple({"x": torch.full((3,), value, requires_grad=True)} for value in (1.0, 5.0))
    return Inputs({}, batches, (torch.ones(3),) * 2)


def test_a_replay_is_compared_on_other_inputs_which_are_put_back():
    inputs, graphs = make_inputs(), []

    def capture(call) -> tuple[Graph, Tensor]:
        graphs.append(Graph(call, call()))
        return graphs[0], graphs[0].output

    error, seconds = replay(doubled(inputs), inputs, "cpu", capture)
    assert error == 0.0
    assert len(seconds) == device_checks.REPLAYS == graphs[0].replays - 1
    assert inputs.batches[0]["x"].tolist() == [1.0] * 3
    assert inputs.batches[0]["x"].requires_grad


def test_a_replay_that_keeps_the_old_answer_is_wrong():
    inputs = make_inputs()
    stale = SimpleNamespace(replay=lambda: None)
    error, _ = replay(doubled(inputs), inputs, "cpu", lambda call: (stale, call()))
    assert error == pytest.approx(0.8)
