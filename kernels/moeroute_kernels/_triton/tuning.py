"""Tiles that are measured on the device at hand, where `MOEROUTE_AUTOTUNE=1` asks for it.

Every product is launched from here. Without the variable it takes its row of the table in `config`.
With it, the first launch of each row tries the tiles around that row on the caller's own tensors,
keeps the fastest for the process, and prints it as the table is written, ready to be pasted. It
waits for the device, so it must come before a CUDA graph is captured; while one is, the table
holds. A pasted row is not done before the tests of the kernels have passed on that device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import TypeVar

import torch
import triton
from triton.errors import TritonError

from moeroute_kernels._triton import config
from moeroute_kernels._triton.config import Row, Tiles

Result = TypeVar("Result")
WARPS = (4, 8)
LEAST_INNER = 32


def launch(row: Row, run: Callable[[Tiles], Result]) -> Result:
    """Return run(tiles) with the tiles of a row: of the table, or the fastest if asked for.

    Args:
        row: Which row of the table.
        run: Launches the product and only writes what it makes, so that it may be repeated.
    """
    tiles = config.table_tiles(row)
    return run(best_tiles(row, tiles, run) if asked() else tiles)


def asked() -> bool:
    """Whether the environment asks for measured tiles."""
    return os.environ.get("MOEROUTE_AUTOTUNE") == "1"


def best_tiles(row: Row, tiles: Tiles, run: Callable[[Tiles], object]) -> Tiles:
    """The fastest tiles of a row on this device, measured once; `tiles` if a graph is captured."""
    found = found_on(device_name())
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if row not in found and not capturing:
        found[row] = search(row, tiles, run)
    return found.get(row, tiles)


@cache
def found_on(device: str) -> dict[Row, Tiles]:
    """What this process has found on the devices of a name; empty at first."""
    return {}


def search(row: Row, tiles: Tiles, run: Callable[[Tiles], object]) -> Tiles:
    """Time the candidates, print the fastest as a row of the table, and return it."""
    times = {tiles: milliseconds(partial(run, tiles))}
    for candidate in candidates(row, tiles):
        try:
            times[candidate] = milliseconds(partial(run, candidate))
        except (TritonError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            _say(f"# {row.kind}, {written(row, candidate)} skipped: {reason}")
    found = min(times, key=times.__getitem__)
    _say(
        f"# {row.kind} on {device_name()}: {times[found]:.4f} ms, {times[tiles]:.4f} ms before\n"
        f"{written(row, found)}"
    )
    return found


def candidates(row: Row, tiles: Tiles) -> Iterator[Tiles]:
    """Half, the same and twice the columns and inner elements; fewer and more warps and stages.

    Rows stay: all products of the same rows share one map of tiles. What cannot fit the device's
    shared memory is left out, and said.
    """
    columns = (tiles.columns // 2, tiles.columns, tiles.columns * 2)
    inner = (tiles.inner // 2, tiles.inner, tiles.inner * 2)
    stages = (tiles.stages - 1, tiles.stages, tiles.stages + 1)
    limit = config.shared_memory()
    for wide, deep, warps, buffers in product(columns, inner, WARPS, stages):
        found = replace(tiles, columns=wide, inner=deep, warps=warps, stages=buffers)
        if found == tiles or wide < config.POINTWISE_ROWS or deep < LEAST_INNER or buffers < 1:
            continue
        needed = buffers * config.stage_bytes(found, row)
        if limit is not None and needed > limit:
            _say(f"# {row.kind}, {written(row, found)} skipped: {needed:,} bytes, {limit:,} fit")
        else:
            yield found


def written(row: Row, tiles: Tiles) -> str:
    """A row as the table writes it."""
    sizes = (tiles.rows, tiles.columns, tiles.inner, tiles.warps, tiles.stages)
    numbers = ", ".join(map(str, sizes)) + (", swapped=True" if tiles.swapped else "")
    return f'("{row.rows}", {row.itemsize}): Tiles({numbers}),'


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call on the device, its caches emptied before each."""
    return triton.testing.do_bench(run, return_mode="median")


def device_name() -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"


def _say(line: str) -> None:
    print(line)  # noqa: T201  # what the variable asks for
