"""The command line measures, prints, writes, and says what it does not know."""

import json
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.cases import AGAIN, Case, select_cases
from benchmarks.measure import Budget
from benchmarks.records import COLUMNS, Record, read_csv
from benchmarks.routed_mlp import BENCHMARK
from benchmarks.run import main
from benchmarks.running import run_case

TRIAL = ["--shape", "tiny,E4k2r8", "--tokens", "3", "--dtype", "fp32", "--rounds", "2"]


def test_a_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table, everything = tmp_path / "rows.csv", tmp_path / "run.json"
    files = ["--append", "--csv", str(table), "--json", str(everything)]
    assert main([*TRIAL, *files]) == 0
    rows = read_csv(table)
    assert tuple(rows[0]) == COLUMNS
    seen = {(row["op"], row["mode"], row["provider"]) for row in rows}
    assert len(seen) == len(rows)
    names = ("moeroute", AGAIN, "grouped_mm", "eager", "batched_mm", "dense")
    assert {("routed_mlp", "fwd_bwd", name) for name in names} == {
        one for one in seen if one[:2] == ("routed_mlp", "fwd_bwd")
    }
    assert ("gated_lora", "fwd", "masked_loop") in seen
    for row in rows:
        if row["mode"] == "mem":
            assert int(row["peak_bytes"]) > 0
            assert int(row["saved_bytes"]) > 0
        else:
            assert row["rounds"] == "2"
            assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
            assert float(row["ours_over_it"]) > 0
        assert row["provider"] == "dense" or float(row["error"]) < 1e-5
    printed = capsys.readouterr().out
    assert "geometric mean of / best" in printed
    assert "PASS  answers and gradients agree with the definition" in printed
    assert len(json.loads(everything.read_text())["records"]) == len(rows)


def test_rows_are_kept_though_the_run_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table, calls = tmp_path / "rows.csv", []

    def broken_off(*given: object) -> list[Record]:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return run_case(*given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(run, "run_case", broken_off)
    with pytest.raises(KeyboardInterrupt):
        main([*TRIAL, "--append", "--csv", str(table)])
    assert {row["mode"] for row in read_csv(table)} == {"fwd"}


def test_no_row_begins_after_the_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = tmp_path / "rows.csv"
    files = ["--append", "--csv", str(table), "--deadline", "1e-9"]
    assert main([*TRIAL, *files]) == 0
    assert read_csv(table) == []
    assert "stopped, time is up: 6 rows were not run" in capsys.readouterr().out


def test_the_rows_of_the_gpu_suite_that_a_cpu_can_run(capsys: pytest.CaptureFixture[str]):
    sizes = ["--suite", "gpu", "--device", "cpu", "--op", "routed_mlp", "--shape", "tiny"]
    assert main([*sizes, "--tokens", "4", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "routed_mlp, mem" in printed
    assert "launches" not in printed
    assert "failed" not in printed


def test_a_peer_is_left_out(tmp_path: Path):
    table = tmp_path / "rows.csv"
    choice = ["--op", "routed_mlp", "--without", "eager,dense"]
    assert main([*TRIAL, *choice, "--append", "--csv", str(table)]) == 0
    names = {row["provider"] for row in read_csv(table)}
    assert names == {"moeroute", AGAIN, "grouped_mm", "batched_mm"}


def test_a_plot_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "new" / "throughput.png"
    sizes = ["--shape", "tiny", "--tokens", "2,3", "--dtype", "fp32", "--rounds", "2"]
    assert main([*sizes, "--modes", "fwd,fwd_bwd", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "wrote throughput.png" in capsys.readouterr().out


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "rows.csv"
    assert main([*TRIAL, "--op", "gated_lora", "--modes", "fwd", "--csv", str(table)]) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_skipped_is_recorded():
    case = Case("routed_mlp", "fwd", "tiny", 64, "fp32", "uniform", "cpu")
    records = {one.provider: one for one in run_case(BENCHMARK, case, Budget(exact=1))}
    assert "copies 128 experts" in records["batched_mm"].note
    assert records["batched_mm"].p50_ms is None
    assert records["grouped_mm"].note == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "E8k3"], "unknown 'E8k3'; use some of"),
        (
            ["--op", "sort"],
            "unknown 'sort'; use some of routed_mlp, gated_lora, lora_mixture, grouped_lora",
        ),
        (["--modes", "launches"], "launches: this needs a CUDA device; give --suite gpu"),
        (["--plot", "throughput.doc"], "cannot write throughput.doc: a plot's suffix is one of"),
        (["--dtype", "fp64"], "unknown 'fp64'; use some of fp32, bf16"),
        (["--modes", "bwd"], "unknown 'bwd'; use some of fwd, fwd_bwd, mem"),
        (["--tokens", "many"], "--tokens"),
        (["--tokens", "-1"], "-1"),
        (["--rounds", "0"], "0"),
        (["--without", "moeroute"], "unknown 'moeroute'; use some of grouped_mm"),
    ],
)
def test_an_unknown_choice_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_no_row_is_no_success(capsys: pytest.CaptureFixture[str]):
    assert main(["--op", "gated_lora", "--shape", "tiny"]) == 2
    assert "no row has this op, mode and shape" in capsys.readouterr().out


def test_a_choice_narrows_the_defaults_and_adds_to_them():
    cases = BENCHMARK.cases("cpu")
    nothing = {"modes": None, "shapes": None, "tokens": None, "dtypes": None, "routings": None}
    assert select_cases(cases, **nothing) == cases
    few = select_cases(cases, **{**nothing, "shapes": ["olmoe-1b-7b"], "modes": ["fwd"]})
    assert {case.shape_name for case in few} == {"olmoe-1b-7b"}
    assert len(few) == len(set(few)) == 8
    other = select_cases(cases, **{**nothing, "tokens": [5], "routings": ["zipf", "one_hot"]})
    assert {(case.tokens, case.routing) for case in other} == {(5, "zipf"), (5, "one_hot")}
