"""Tiles are measured where the environment asks for it, kept for the process, and printed."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from routed_cases import Case
from triton_cases import check

pytest.importorskip("triton", reason="the kernels are written in Triton")

from triton.runtime.errors import OutOfResources

from moeroute_kernels._triton import config, tuning
from moeroute_kernels._triton.config import Row, Tiles

ROW = config.product_row("rows", 4096, 8, torch.bfloat16)
TABLE_TILES = config.TABLE["rows"]["many", 2]
FASTEST = Tiles(128, 128, 32, 4, 3)
UNCOMPILED = Tiles(128, 64, 32, 4, 3)


@pytest.fixture
def forget() -> Iterator[None]:
    """Keep nothing that was found from one test to the next."""
    tuning.found_on.cache_clear()
    yield
    tuning.found_on.cache_clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, forget: None) -> list[Tiles]:
    """Ask for measured tiles, with a timer that knows the fastest; yields what it was given."""
    given: list[Tiles] = []

    def milliseconds(run: partial[object]) -> float:
        given.append(run.args[0])
        if given[-1] == UNCOMPILED:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0 if given[-1] == FASTEST else 2.0

    monkeypatch.setenv("MOEROUTE_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    return given


def test_the_table_holds_where_nobody_asks(timed: list[Tiles], monkeypatch: pytest.MonkeyPatch):
    for value in (None, "", "0"):
        if value is None:
            monkeypatch.delenv("MOEROUTE_AUTOTUNE")
        else:
            monkeypatch.setenv("MOEROUTE_AUTOTUNE", value)
        assert tuning.launch(ROW, lambda tiles: tiles) == config.table_tiles(ROW)
    assert timed == []


def test_the_fastest_is_found_once_and_returned(timed: list[Tiles]):
    assert tuning.launch(ROW, lambda tiles: tiles) == FASTEST
    tried = len(timed)
    assert tried == len(set(timed)) > 1
    assert timed[0] == config.table_tiles(ROW)
    # another number of tokens of the same class
    again = config.product_row("rows", 40_000, 8, torch.float16)
    assert tuning.launch(again, lambda tiles: tiles) == FASTEST
    assert len(timed) == tried


def test_rows_of_a_tile_stay(timed: list[Tiles]):
    """All products of the same rows share one map of tiles."""
    tuning.launch(ROW, lambda tiles: tiles)
    assert {tiles.rows for tiles in timed} == {TABLE_TILES.rows}


@pytest.mark.parametrize(
    "other",
    [
        Row("up", ROW.rows, ROW.itemsize),
        Row(ROW.kind, "some", ROW.itemsize),
        Row(ROW.kind, ROW.rows, 4),
    ],
    ids=["kind", "rows", "itemsize"],
)
def test_each_row_is_measured(other: Row, timed: list[Tiles]):
    tuning.launch(ROW, lambda tiles: tiles)
    tried = len(timed)
    tuning.launch(other, lambda tiles: tiles)
    assert len(timed) > tried


def test_prints_a_row_to_paste_and_what_it_skipped(
    timed: list[Tiles], capsys: pytest.CaptureFixture[str]
):
    tuning.launch(ROW, lambda tiles: tiles)
    said = capsys.readouterr().out
    skipped = [line for line in said.splitlines() if tuning.written(ROW, UNCOMPILED) in line]
    assert len(skipped) == 1
    assert "300000" in skipped[0]
    assert "rows on " in said
    assert "1.0000 ms, 2.0000 ms before" in said
    pasted = eval("{" + said + "\n}", {"Tiles": Tiles})
    assert pasted == {("many", 2): FASTEST}


@pytest.mark.parametrize("kind", config.TABLE)
def test_every_row_of_the_table_is_written_as_it_is_read(kind: str):
    for (rows, itemsize), tiles in config.TABLE[kind].items():
        line = tuning.written(Row(kind, rows, itemsize), tiles)
        assert eval("{" + line + "}", {"Tiles": Tiles}) == {(rows, itemsize): tiles}


def test_what_does_not_fit_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    limit = 98_304
    monkeypatch.setattr(config, "shared_memory", lambda: limit)
    found = list(tuning.candidates(ROW, TABLE_TILES))
    assert found
    assert all(each.stages * config.stage_bytes(each, ROW) <= limit for each in found)
    assert "skipped" in capsys.readouterr().out


@pytest.mark.usefixtures("triton_ops", "forget")
@pytest.mark.parametrize("activation", ["silu_glu", "relu2"])
def test_measured_tiles_compute_the_same(activation: str, monkeypatch: pytest.MonkeyPatch):
    """Launches are repeated, and whatever tiles win, output and gradients are right."""
    tried: list[Tiles] = []

    def milliseconds(run: Callable[[], object]) -> float:
        assert isinstance(run, partial)
        tried.append(run.args[0])
        if tried[-1].warps == max(tuning.WARPS):  # half of them, for time
            raise RuntimeError("left out")
        run()
        return 1.0 / len(tried)

    monkeypatch.setenv("MOEROUTE_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    check(Case(5, 2, 3, 24, 16, activation=activation, bias=True))
    kinds = {row.kind for row in tuning.found_on(tuning.device_name())}
    assert kinds == {"rows", "up", "inner", "gathered weights"}
    assert len(tried) > 10 * len(kinds)
