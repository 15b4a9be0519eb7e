"""A promise is kept, missed or untold by the rows of a run, and a wrong answer wins nothing."""

import math
from dataclasses import replace

import pytest

from benchmarks.cases import AGAIN, OURS
from benchmarks.floors import Verdict, judge, noise, rows_of
from benchmarks.layer_floors import judge_layers
from benchmarks.records import Record

ROW = Record(
    *("routed_mlp", OURS, "fwd_bwd", "E64k8", 16, "fp32", "uniform"),
    rounds=9,
    p50_ms=1.0,
    ours_over_it=1.0,
    error=1e-7,
)


def row(**ratios: float) -> list[Record]:
    peers = [
        replace(ROW, provider=name, p50_ms=1 / ratio, ours_over_it=ratio)
        for name, ratio in ratios.items()
    ]
    return [ROW, *peers]


def verdicts(records: list[Record]) -> dict[str, Verdict]:
    words = ("definition", "mean", "1.10", "eager", "saved", "gated_lora")
    found = dict(zip(words, judge(records), strict=True))
    words = ("of plain LoRA", "of a loop", "rebuilt", "decode", "peft", "peft decode")
    words = (*words, "router", "half", "all")
    return found | dict(zip(words, judge_layers(rows_of(records)), strict=True))


def test_a_run_that_keeps_every_promise():
    seen = verdicts(row(grouped_mm=0.9, eager=0.05, batched_mm=0.3))
    told = {"definition": True, "mean": True, "1.10": True, "eager": True}
    assert {word: verdict.kept for word, verdict in seen.items()} == {
        **told,
        "saved": None,
        "gated_lora": None,
        "of plain LoRA": None,
        "of a loop": None,
        "rebuilt": None,
        "decode": None,
        "peft": None,
        "peft decode": None,
        "router": None,
        "half": None,
        "all": None,
    }
    assert "0.900 over 1 rows" in seen["mean"].line
    assert "20.0x" in seen["eager"].line


def test_the_best_peer_is_the_fastest_one():
    (only,) = rows_of(row(grouped_mm=0.5, eager=1.2, batched_mm=0.1))
    assert only.best_peer is not None
    assert (only.best_peer.provider, only.of_best) == ("eager", 1.2)


def test_a_slow_row_is_named():
    seen = verdicts(row(grouped_mm=1.2, eager=0.5))
    assert [seen[word].kept for word in ("mean", "1.10", "eager")] == [False, False, False]
    assert seen["1.10"].misses == ("1.200  routed_mlp fwd_bwd E64k8 T=16 fp32 uniform",)
    assert seen["eager"].misses == ("2.00x  routed_mlp fwd_bwd E64k8 T=16 fp32 uniform",)


def test_a_line_that_is_no_peer_is_no_best():
    (only,) = rows_of(row(grouped_mm=0.9, dense=3.0, **{AGAIN: 1.01}))
    assert only.of_best == 0.9


def test_a_wrong_peer_is_not_the_best():
    records = [
        replace(record, error=math.inf) if record.provider == "eager" else record
        for record in row(grouped_mm=0.9, eager=2.0)
    ]
    (only,) = rows_of(records)
    assert only.of_best == 0.9


def test_a_wrong_answer_of_ours_misses():
    records = [replace(ROW, error=0.1), *row(grouped_mm=0.5, eager=0.1)[1:]]
    seen = verdicts(records)
    assert [seen[word].kept for word in ("definition", "mean", "1.10")] == [False, False, False]


def test_saved_bytes_are_judged_at_their_shape():
    ours = replace(ROW, mode="mem", shape_name="d2048n768k8", p50_ms=None, saved_bytes=29)
    theirs = replace(ours, provider="grouped_mm", saved_bytes=100)
    assert verdicts([ours, theirs])["saved"].kept is True
    assert verdicts([replace(ours, saved_bytes=31), theirs])["saved"].kept is False


def test_the_mixture_has_no_slack_but_noise_is_told():
    ours = replace(ROW, op="gated_lora", shape_name="E4k2r8", tokens=64)
    peer = replace(ours, provider="dense_stacked", ours_over_it=1.02, p50_ms=0.98)
    again = replace(ours, provider=AGAIN, ours_over_it=0.97)
    assert noise(rows_of([ours, peer, again])) == 1 - 0.97
    verdict = verdicts([ours, peer, again])["gated_lora"]
    assert verdict.kept is False
    assert "0 of the 1 misses are beyond the noise" in verdict.figure


def test_other_shapes_tell_nothing_about_the_promises():
    seen = verdicts([replace(record, shape_name="tiny") for record in row(grouped_mm=2.0)])
    assert [verdict.kept for verdict in seen.values()] == [True] + [None] * 14


@pytest.mark.parametrize(
    ("op", "peer", "trained", "decoded"),
    [
        ("grouped_lora", "rebuilt", "rebuilt", "decode"),
        ("expert_lora", "peft", "peft", "peft decode"),
    ],
)
def test_lora_on_experts_is_judged_against_rebuilt_stacks(
    op: str, peer: str, trained: str, decoded: str
):
    def pair(mode: str, shape: str, tokens: int, ratio: float) -> list[Record]:
        ours = replace(ROW, op=op, mode=mode, shape_name=shape, tokens=tokens)
        return [ours, replace(ours, provider=peer, ours_over_it=ratio, p50_ms=1 / ratio)]

    kept = pair("fwd_bwd", "E8k2-r16", 256, 0.49) + pair("fwd", "E32k4-r16", 1, 0.12)
    seen = verdicts(kept)
    assert (seen[trained].kept, seen[decoded].kept) == (True, True)
    late = pair("fwd_bwd", "E64k8-r16", 16, 0.51) + pair("fwd", "E32k4-r16", 1, 0.13)
    seen = verdicts(kept + late)
    assert (seen[trained].kept, seen[decoded].kept) == (False, False)
    assert seen[trained].misses == (f"1.96x  {op} fwd_bwd E64k8-r16 T=16 fp32 uniform",)


def test_a_router_is_judged_against_the_one_that_it_equals():
    ours = replace(ROW, op="router", shape_name="mixtral-E64k8", tokens=4096)
    theirs = replace(ours, provider="transformers", ours_over_it=1.2)
    assert verdicts([ours, theirs])["router"].kept is True
    assert verdicts([ours, replace(theirs, ours_over_it=1.4)])["router"].kept is False


def test_depth_is_judged_against_the_base():
    ours = replace(ROW, op="depth", mode="fwd", shape_name="L12-half", tokens=1)
    base = replace(ours, provider="base", ours_over_it=0.59)
    seen = verdicts([ours, base])
    assert (seen["half"].kept, seen["all"].kept) == (True, None)
    whole = [replace(one, shape_name="L12-all") for one in (ours, base)]
    assert verdicts([whole[0], replace(whole[1], ours_over_it=1.05)])["all"].kept is False


def test_who_raised_has_no_answer():
    raised = replace(ROW, p50_ms=None, ours_over_it=None, error=None, note="failed: no memory")
    peer = replace(ROW, provider="grouped_mm", ours_over_it=None)
    seen = verdicts([raised, peer])
    assert seen["definition"].kept is False
    assert seen["definition"].misses[0].startswith("failed: no memory")
    assert seen["1.10"].kept is False
    peers = [replace(one, note="failed: x", p50_ms=None) for one in row(eager=2.0)[1:]]
    (only,) = rows_of([ROW, *peers, *row(grouped_mm=0.9)[1:]])
    assert only.of_best == 0.9


def test_a_mixture_is_held_to_plain_lora_and_to_a_loop():
    ours = replace(ROW, op="lora_mixture", shape_name="E8k2r16", tokens=64)
    plain = replace(ours, provider="peft_lora", ours_over_it=1.25)
    loop = replace(ours, provider="masked_loop", ours_over_it=0.6)
    seen = verdicts([ours, plain, loop])
    assert seen["of plain LoRA"].kept
    assert seen["of a loop"].misses == ("0.600  lora_mixture fwd_bwd E8k2r16 T=64 fp32 uniform",)
