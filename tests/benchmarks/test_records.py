"""Rows are appended, complete, and say nothing about the machine but its processor."""

import getpass
import json
import platform
from pathlib import Path

import pytest

from benchmarks.records import COLUMNS, ROOT, Record, append_csv, read_csv, stamp, write_json

RECORD = Record("routed_mlp", "moeroute", "fwd", "tiny", 8, "fp32", "uniform", p50_ms=1.23456789)
ASKED = ("op", "provider", "mode", "shape_name", "tokens", "dtype", "p20_ms", "p50_ms", "p80_ms")
ALSO = ("saved_bytes", "peak_bytes", "device", "torch", "triton", "commit", "dirty", "date")


def test_the_columns_are_those_of_the_house():
    assert {*ASKED, *ALSO} <= set(COLUMNS)


def test_appending_keeps_what_is_there(tmp_path: Path):
    path, made = tmp_path / "results.csv", stamp("cpu")
    append_csv(path, [RECORD], made)
    before = path.read_text()
    append_csv(path, [RECORD, RECORD], made)
    assert path.read_text().startswith(before)
    rows = read_csv(path)
    assert len(rows) == 3
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["p50_ms"] == "1.235"
    assert rows[0]["p20_ms"] == ""
    assert rows[0]["tokens"] == "8"


def test_a_foreign_file_is_left_alone(tmp_path: Path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv has the columns .* use a new file"):
        append_csv(path, [RECORD], stamp("cpu"))
    assert path.read_text() == "a,b\n1,2\n"


def test_json_holds_the_run(tmp_path: Path):
    path = tmp_path / "run.json"
    write_json(path, [RECORD], stamp("cpu"), ["PASS  everything"])
    read = json.loads(path.read_text())
    assert read["records"][0]["p50_ms"] == RECORD.p50_ms
    assert read["verdicts"] == ["PASS  everything"]
    assert read["run"]["torch"]


def test_no_name_of_machine_user_or_folder_is_written():
    made = stamp("cpu")
    text = repr(made)
    assert made.device
    for private in (platform.node(), str(ROOT), getpass.getuser()):
        assert len(private) < 3 or private not in text


def test_the_committed_results_are_whole():
    rows = read_csv(ROOT / "benchmarks" / "results.csv")
    assert tuple(rows[0]) == COLUMNS
    assert all(row["commit"] and row["date"] and row["device"] for row in rows)
    assert all(row["p50_ms"] or row["saved_bytes"] or row["note"] for row in rows)
