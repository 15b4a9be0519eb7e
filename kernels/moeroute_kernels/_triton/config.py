"""Tile sizes: a plain table by kind of product, size of element and rows per expert.

Nothing here depends on the number of tokens but through three classes of rows per expert, so that
no kernel is compiled again for another number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

FEW_ROWS = 24
"""Most rows per expert for which a tile has 16 rows, and rows and columns change places."""
SOME_ROWS = 96
"""Most rows per expert for which a tile has 64 rows."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one kernel is laid out.

    Attributes:
        rows: Rows of a tile.
        columns: Columns of a tile; of gate and up together where both are made.
        inner: Elements that one step of the sum takes.
        warps: Warps of a program.
        stages: Buffers of the pipeline.
        swapped: Compute the tile's transpose: a product of 16 rows would miss the tensor cores'
            widest instruction, 64 weight columns by 16 rows take it.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    swapped: bool = False


ROW_TILES = {
    ("few", 2): Tiles(16, 64, 128, 4, 4, swapped=True),
    ("some", 2): Tiles(64, 128, 64, 4, 4),
    ("many", 2): Tiles(128, 128, 64, 8, 4),
    ("few", 4): Tiles(16, 64, 32, 4, 3, swapped=True),
    ("some", 4): Tiles(64, 32, 32, 8, 3),
    ("many", 4): Tiles(64, 32, 32, 8, 3),
}
"""Rows times a weight, by rows per expert and bytes of an element."""
INNER_TILES = {
    ("few", 2): Tiles(16, 64, 128, 4, 4, swapped=True),
    ("some", 2): Tiles(64, 64, 64, 8, 4),
    ("many", 2): Tiles(128, 64, 64, 8, 4),
    ("few", 4): Tiles(16, 32, 64, 4, 3, swapped=True),
    ("some", 4): Tiles(64, 32, 32, 8, 3),
    ("many", 4): Tiles(64, 32, 32, 8, 3),
}
"""The same for the backward kernel between the two products: its epilogue holds six tiles."""
MOST_INTERLEAVED = 64 * 64
"""Elements of a tile of that kernel where gate and up alternate."""
WEIGHT_TILES = {2: Tiles(128, 128, 64, 8, 4), 4: Tiles(64, 64, 32, 4, 3)}
"""Gradients of weights (rows and columns of the matrix, rows of the sum), by bytes."""
SHARED_MEMORY = {
    80: 166_912,
    86: 101_376,
    87: 166_912,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    110: 232_448,
    120: 101_376,
    121: 101_376,
}
"""Bytes that one program may have, by architecture of CUDA."""
LEAST_SHARED_MEMORY = 65_536
"""Of any other device."""
RESERVED = 4096
"""Bytes of it for reductions and barriers."""
UNSORTED_SHARE = 0.25
"""Most slots per expert that inference leaves unsorted."""
POINTWISE_ROWS = 16
POINTWISE_COLUMNS = 128


def rows_class(num_rows: int, num_groups: int) -> str:
    """How many rows an expert has on average: "few", "some" or "many"."""
    mean = triton.cdiv(num_rows, num_groups)
    if mean <= FEW_ROWS:
        return "few"
    return "some" if mean <= SOME_ROWS else "many"


def sorting_pays(num_tokens: int, num_slots: int, num_experts: int) -> bool:
    """Tell whether inference sorts its slots, or makes each of them a tile of its own.

    What sorting saves is reading an expert's weights once for all its rows. One token's experts
    differ, so there is nothing to save; N slots drawn from E experts meet in about N**2 / 2E pairs,
    so up to E / 4 slots it would save an eighth of the reads at most, and of those the L2 holds
    most already, as neighbouring tiles run side by side. That is worth less than the launch.

    Args:
        num_tokens: T.
        num_slots: K, of one token.
        num_experts: E.
    """
    return num_tokens > 1 and num_tokens * num_slots > num_experts * UNSORTED_SHARE


def row_tiles(num_rows: int, num_groups: int, dtype: torch.dtype) -> Tiles:
    """Tiles of a product of rows with a weight."""
    return fitted(ROW_TILES[rows_class(num_rows, num_groups), dtype.itemsize], dtype)


def inner_tiles(num_rows: int, num_groups: int, dtype: torch.dtype, *, interleaved: bool) -> Tiles:
    """Tiles of the backward kernel in the width of the experts; as many rows as `row_tiles`."""
    tiles = INNER_TILES[rows_class(num_rows, num_groups), dtype.itemsize]
    # gate and up pass through the registers together; 128 x 2 * 64 of them do not fit
    spilling = interleaved and tiles.rows * tiles.columns > MOST_INTERLEAVED
    tiles = replace(tiles, columns=tiles.columns // 2) if spilling else tiles
    return fitted(tiles, dtype)


def weight_tiles(dtype: torch.dtype, *, gathered: bool) -> Tiles:
    """Tiles of the gradient of a weight.

    Args:
        dtype: Of the rows.
        gathered: Whether rows are found by an index, whose load is a stage of its own.
    """
    tiles = WEIGHT_TILES[dtype.itemsize]
    return fitted(replace(tiles, stages=tiles.stages + gathered), dtype)


def fitted(tiles: Tiles, dtype: torch.dtype) -> Tiles:
    """The same tiles with as many stages as the device's shared memory holds."""
    if triton.knobs.runtime.interpret:
        return tiles
    target = triton.runtime.driver.active.get_current_target()
    limit = SHARED_MEMORY.get(target.arch, LEAST_SHARED_MEMORY) - RESERVED
    stage = (tiles.rows + tiles.columns) * tiles.inner * dtype.itemsize
    return replace(tiles, stages=max(min(tiles.stages, limit // stage), 1))


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must widen what it loads: the interpreter has no bfloat16 arithmetic."""
    return triton.knobs.runtime.interpret and dtype == torch.bfloat16
