"""One provider that breaks down takes nobody with it, and inputs are shared where they may be."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import running
from benchmarks.cases import AGAIN, OURS, Bound, Case, Inputs, Provider
from benchmarks.floors import is_wrong
from benchmarks.measure import Budget
from benchmarks.records import Record
from benchmarks.routed_mlp import BENCHMARK
from benchmarks.running import prepare, run_case

CASE = Case("routed_mlp", "fwd", "tiny", 3, "fp32", "uniform", "cpu")
BUDGET = Budget(exact=2)


def breaking(name: str, *, after: int) -> Provider:
    """Right for a number of calls, then out of order."""

    def bind(inputs: Inputs) -> Bound:
        plain, calls = BENCHMARK.providers[0].bind(inputs), []

        def run(index: int) -> Tensor:
            calls.append(index)
            if len(calls) > after:
                raise RuntimeError("no room\nfor this")
            return plain.run(index)

        return Bound(run, plain.leaves)

    return Provider(name, bind, peer=name != OURS)


def run_with(*providers: Provider, mode: str = "fwd") -> dict[str, Record]:
    names = {one.name for one in providers}
    kept = [one for one in BENCHMARK.providers if one.name not in names]
    benchmark = replace(BENCHMARK, providers=(*providers, *kept))
    return {one.provider: one for one in run_case(benchmark, replace(CASE, mode=mode), BUDGET)}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_broken_peer_is_told_and_the_others_are_timed(after: int):
    seen = run_with(breaking("liger", after=after))
    assert seen["liger"].note == "failed: RuntimeError: no room"
    assert seen["liger"].p50_ms is None
    assert is_wrong(seen["liger"])
    for name in (OURS, AGAIN, "grouped_mm", "eager"):
        assert seen[name].rounds == 2
        assert seen[name].ours_over_it is not None


@pytest.mark.parametrize("after", [0, 1])
def test_the_peers_have_times_where_ours_is_broken(after: int):
    seen = run_with(breaking(OURS, after=after))
    assert seen[OURS].failed
    assert AGAIN not in seen
    assert seen["grouped_mm"].p50_ms is not None
    assert seen["grouped_mm"].ours_over_it is None


def test_bytes_of_a_broken_provider():
    seen = run_with(breaking("liger", after=1), mode="mem")
    assert seen["liger"].failed
    assert seen["grouped_mm"].peak_bytes


def test_who_is_for_another_device_has_no_row():
    assert not {"hand_sorted", "liger", "scattermoe", "gemm"} & set(run_with())


def test_modes_of_ours_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running.device_checks, "replay", lambda *_: (0.25, [1e-3, 3e-3, 2e-3]))
    seen = run_with(mode="graph")
    assert list(seen) == [OURS]
    assert (seen[OURS].error, seen[OURS].p50_ms, seen[OURS].rounds) == (0.25, 2.0, 3)


def test_launches_of_everyone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running.device_checks, "count_launches", lambda call: len(call()))
    seen = run_with(mode="launches")
    assert {"grouped_mm", "eager", OURS} <= set(seen)
    assert {one.count for one in seen.values()} == {1}


def test_new_kernels_are_counted_after_the_first_tokens(monkeypatch: pytest.MonkeyPatch):
    """A kernel for every T is seen twenty times, one for each parity not once."""
    runtime = pytest.importorskip("triton").knobs.runtime

    def compiling(key) -> Provider:
        known = set()

        def bind(inputs: Inputs) -> Bound:
            plain = BENCHMARK.providers[0].bind(inputs)
            kind = key(len(inputs.batches[0]["x"]))
            if kind not in known:
                known.add(kind)
                if runtime.jit_post_compile_hook:
                    told = type("Kernel", (), {"name": str(kind)})
                    runtime.jit_post_compile_hook(fn=told)
            return plain

        return Provider(OURS, bind, peer=False)

    monkeypatch.setattr(running, "COMPILE_SEEN_TOKENS", (1, 2))
    monkeypatch.setattr(running, "COMPILE_TOKENS", tuple(range(3, 23)))
    each = run_with(compiling(lambda tokens: tokens), mode="compiles")
    parity = run_with(compiling(lambda tokens: tokens % 2), mode="compiles")
    assert (each[OURS].count, parity[OURS].count) == (19, 0)


def test_gradients_that_were_computed_serve_the_forward_too():
    trained = prepare(BENCHMARK, replace(CASE, mode="fwd_bwd"))
    assert trained.serves(CASE)
    assert trained.serves(replace(CASE, mode="mem"))
    assert not trained.serves(replace(CASE, tokens=4))
    assert not trained.serves(replace(CASE, routing="zipf"))
    forward = prepare(BENCHMARK, CASE)
    assert not forward.serves(replace(CASE, mode="fwd_bwd"))
    records = run_case(BENCHMARK, CASE, BUDGET, trained)
    assert all(one.error is None or one.error < 1e-6 for one in records)
    assert torch.equal(trained.wanted[0], forward.wanted[0])
