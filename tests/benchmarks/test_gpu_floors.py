"""The promises for a GPU, judged on rows made by hand."""

from benchmarks.cases import OURS
from benchmarks.floors import rows_of
from benchmarks.gpu_floors import judge_gpu
from benchmarks.records import Record


def record(provider: str, mode: str, tokens: int, ratio: float, shape: str) -> Record:
    return Record(
        op="routed_mlp",
        provider=provider,
        mode=mode,
        shape_name=shape,
        tokens=tokens,
        dtype="bf16",
        routing="uniform",
        clock="wall",
        rounds=7,
        p20_ms=1.0,
        p50_ms=1.0 / ratio,
        p80_ms=1.0,
        ours_over_it=ratio,
        error=1e-3,
    )


def rows(dense: float, grouped: float, mode: str, shape: str = "qwen3-30b-a3b") -> list[Record]:
    given = {OURS: 1.0, "grouped_mm": grouped, "dense": dense}
    return [record(name, mode, 32768, ratio, shape) for name, ratio in given.items()]


def test_rows_of_a_cpu_are_not_judged():
    assert judge_gpu(rows_of(rows(1.0, 1.0, "fwd", "E8k2"))) == []


def test_kept():
    records = rows(1 / 0.61, 0.5, "fwd") + rows(1 / 0.51, 1 / 1.6, "fwd_bwd")
    assert [verdict.kept for verdict in judge_gpu(rows_of(records))] == [True] * 4


def test_missed():
    records = rows(1 / 0.59, 1.1, "fwd") + rows(1 / 0.49, 1 / 1.4, "fwd_bwd")
    assert [verdict.kept for verdict in judge_gpu(rows_of(records))] == [False] * 4


def test_what_was_not_run_is_not_judged():
    verdicts = judge_gpu(rows_of(rows(1.0, 0.9, "fwd", "olmoe-1b-7b")))
    assert [verdict.kept for verdict in verdicts] == [None, None, None, True]
