"""The promises for a GPU, judged on rows made by hand."""

import pytest

from benchmarks.cases import OURS
from benchmarks.floors import Verdict, rows_of
from benchmarks.gpu_floors import judge_gpu
from benchmarks.records import Record
from benchmarks.roofline import Ceiling
from benchmarks.shapes import EXPERT_SHAPES, GPU_JUDGED_SHAPE

MOST = {"bf16": Ceiling(flops=1e15, bytes=4e12)}
LAYER = EXPERT_SHAPES[GPU_JUDGED_SHAPE]


def record(
    provider: str, mode: str, tokens: int, shape: str = GPU_JUDGED_SHAPE, **values: object
) -> Record:
    return Record(
        "routed_mlp",
        provider,
        mode,
        shape,
        tokens,
        "bf16",
        "uniform",
        **values,  # pyright: ignore[reportArgumentType]
    )


def timed(mode: str, tokens: int, shape: str = GPU_JUDGED_SHAPE, **ratios: float) -> list[Record]:
    return [
        record(name, mode, tokens, shape, p50_ms=1 / ratio, ours_over_it=ratio, error=1e-3)
        for name, ratio in {OURS: 1.0, **ratios}.items()
    ]


def judged(*records: Record) -> dict[str, bool | None]:
    """The verdicts that some row tells, by the first words that tell them apart."""
    return {
        next(word for word in WORDS if word in verdict.promise): verdict.kept
        for verdict in verdicts(*records)
        if verdict.kept is not None
    }


WORDS = (
    "fwd_bwd qwen3",
    "fwd qwen3",
    "fwd_bwd olmoe",
    "fwd olmoe",
    "copy",
    "than grouped_mm",
    "than scattermoe",
    "than liger",
    "best peer",
    "peak",
    "launches",
    "anew",
    "graph",
)


def verdicts(*records: Record) -> list[Verdict]:
    return judge_gpu(rows_of(records), MOST)


def test_rows_of_a_cpu_are_not_judged():
    assert verdicts(*timed("fwd", 32768, "E8k2")) == []


def test_every_promise_has_a_word_here():
    assert len(verdicts(*timed("fwd", 32768))) == len(WORDS)


@pytest.mark.parametrize(("of_gemm", "kept"), [(0.61, True), (0.59, False)])
def test_forward_beside_one_product(of_gemm: float, kept: bool):
    assert judged(*timed("fwd", 32768, gemm=1 / of_gemm)) == {"fwd qwen3": kept}


@pytest.mark.parametrize(("of_gemm", "kept"), [(0.51, True), (0.49, False)])
def test_training_beside_one_product(of_gemm: float, kept: bool):
    assert judged(*timed("fwd_bwd", 32768, gemm=1 / of_gemm)) == {"fwd_bwd qwen3": kept}


@pytest.mark.parametrize(("of_gemm", "kept"), [(0.46, True), (0.44, False)])
def test_other_layers_are_to_come_near(of_gemm: float, kept: bool):
    rows = timed("fwd_bwd", 32768, "gpt-oss-20b", gemm=1 / of_gemm)
    assert judged(*rows) == {"fwd_bwd olmoe": kept}


@pytest.mark.parametrize(
    ("peer", "least"), [("grouped_mm", 1.5), ("scattermoe", 1.5), ("liger", 1.3)]
)
def test_the_lead_over_other_kernels(peer: str, least: float):
    for speedup, kept in ((least + 0.01, True), (least - 0.01, False)):
        told = judged(*timed("fwd_bwd", 8192, **{peer: 1 / speedup}))
        assert told == {f"than {peer}": kept, "best peer": True}
    assert judged(*timed("fwd_bwd", 512, **{peer: 0.9})) == {"best peer": True}


def test_never_slower_than_the_best_peer():
    assert judged(*timed("fwd_bwd", 512, hand_sorted=1.2, grouped_mm=0.5)) == {"best peer": False}


def test_few_tokens_read_the_weights_at_the_speed_of_a_copy():
    matrices = 3 * LAYER.hidden_size * LAYER.intermediate_size * 2
    least = 1e3 * LAYER.experts_hit(64) * matrices / MOST["bf16"].bytes
    for part, kept in ((0.86, True), (0.84, False)):
        ours = record(OURS, "fwd", 64, p50_ms=least / part, ours_over_it=1.0, error=1e-3)
        assert judged(ours) == {"copy": kept}


@pytest.mark.parametrize(("peak", "kept"), [(59, True), (61, False)])
def test_peak_memory(peak: int, kept: bool):
    ours = record(OURS, "mem", 32768, peak_bytes=peak, saved_bytes=1, error=1e-3)
    theirs = record("grouped_mm", "mem", 32768, peak_bytes=100, saved_bytes=1)
    assert judged(ours, theirs) == {"peak": kept}


def test_counts():
    def counted(mode: str, count: int) -> Record:
        return record(OURS, mode, 1, count=count, error=1e-3)

    assert judged(counted("launches", 4), counted("compiles", 0)) == {
        "launches": True,
        "anew": True,
    }
    assert judged(counted("launches", 5), counted("compiles", 1)) == {
        "launches": False,
        "anew": False,
    }


def test_a_graph_replays_to_the_right_answer():
    right = record(OURS, "graph", 1, error=0.0, p50_ms=0.1)
    assert judged(right) == {"graph": True}
    assert judged(right, record(OURS, "graph", 128, error=0.5, p50_ms=0.1)) == {"graph": False}
    broken = record(OURS, "graph", 128, note="failed: capture")
    (verdict,) = [one for one in verdicts(right, broken) if "graph" in one.promise]
    assert verdict.kept is False
    assert "failed: capture" in verdict.misses[0]


def test_a_wrong_answer_is_not_fast():
    rows = timed("fwd_bwd", 32768, gemm=1.0, liger=0.1)
    wrong = [record(OURS, "fwd_bwd", 32768, p50_ms=1.0, ours_over_it=1.0, error=0.5), *rows[1:]]
    assert judged(*wrong) == {"best peer": False}
