"""Tile sizes: a plain table by kind of product, rows per expert and size of element.

Nothing here depends on the number of tokens but through three classes of rows per expert, so that
no kernel is compiled again for another number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

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
INFERENCE_TILES = ROW_TILES | {("many", 2): Tiles(128, 256, 64, 8, 3)}
"""The same where nothing is kept for backward, which leaves registers for a wider tile; not for
pointers or masks: those spill, so only a weight that `source.comes_whole` takes it."""
WHOLE_STEP = 64
INNER_TILES = {
    ("few", 2): Tiles(16, 64, 128, 4, 4, swapped=True),
    ("some", 2): Tiles(64, 64, 64, 8, 4),
    ("many", 2): Tiles(128, 64, 64, 8, 4),
    ("few", 4): Tiles(16, 32, 64, 4, 3, swapped=True),
    ("some", 4): Tiles(64, 32, 32, 8, 3),
    ("many", 4): Tiles(64, 32, 32, 8, 3),
}
"""The same for the backward kernel between the two products: its epilogue holds six tiles."""
INTERLEAVED_INNER_TILES = INNER_TILES | {
    ("some", 2): Tiles(64, 32, 64, 8, 4),
    ("many", 2): Tiles(128, 32, 64, 8, 4),
}
"""The same where gate and up alternate: they pass through the registers together."""
WEIGHT_TILES = {("any", 2): Tiles(128, 128, 64, 8, 4), ("any", 4): Tiles(64, 64, 32, 4, 3)}
"""Gradients of weights: rows and columns of the matrix, rows of the sum."""
GATHERED_WEIGHT_TILES = {
    ("any", 2): Tiles(128, 128, 64, 8, 5),
    ("any", 4): Tiles(64, 64, 32, 4, 4),
}
"""The same where rows are found by an index, whose load is a stage of its own."""
TABLE = {
    "rows": ROW_TILES,
    "up": ROW_TILES,
    "inference up": INFERENCE_TILES,
    "inference down": INFERENCE_TILES,
    "inner": INNER_TILES,
    "interleaved inner": INTERLEAVED_INNER_TILES,
    "weights": WEIGHT_TILES,
    "gathered weights": GATHERED_WEIGHT_TILES,
}
"""By kind of product; those of the same rows share one map of tiles, so its rows do not differ."""
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
LEAST_STAGES = 2
LEAST_COLUMNS = 64
"""Columns are halved down to this where not even so many stages fit."""
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


def sorting_pays(ids: Tensor, num_groups: int) -> bool:
    """Tell whether inference sorts its slots, or makes each of them a tile of its own.

    What sorting saves is reading an expert's weights once for all its rows. One token's experts
    differ, so there is nothing to save; N slots drawn from E experts meet in about N**2 / 2E pairs,
    so up to E / 4 slots it would save an eighth of the reads at most, and of those the L2 holds
    most already, as neighbouring tiles run side by side. That is worth less than the launch.

    Args:
        ids: (T, K).
        num_groups: E.
    """
    return ids.shape[0] > 1 and ids.numel() > num_groups * UNSORTED_SHARE


@dataclass(frozen=True, slots=True)
class Row:
    """Which row of the table a launch takes.

    Attributes:
        kind: Key of `TABLE`.
        rows: "few", "some" or "many" rows per expert; "any" where it does not matter.
        itemsize: Bytes of an element.
    """

    kind: str
    rows: str
    itemsize: int


def product_row(kind: str, num_rows: int, num_groups: int, dtype: torch.dtype) -> Row:
    """The row of a product of rows with a weight."""
    return Row(kind, rows_class(num_rows, num_groups), dtype.itemsize)


def weights_row(dtype: torch.dtype, *, gathered: bool) -> Row:
    """The row of the gradient of a weight, whose rows may be found by an index."""
    return Row("gathered weights" if gathered else "weights", "any", dtype.itemsize)


def block_rows(num_rows: int, num_groups: int, dtype: torch.dtype) -> int:
    """Most rows of a tile, in every product of these rows."""
    return ROW_TILES[rows_class(num_rows, num_groups), dtype.itemsize].rows


def table_tiles(row: Row) -> Tiles:
    """What the table says, as far as the device's shared memory holds it."""
    tiles = TABLE[row.kind][row.rows, row.itemsize]
    limit = shared_memory()
    if limit is None:
        return tiles
    while tiles.columns > LEAST_COLUMNS and LEAST_STAGES * stage_bytes(tiles, row) > limit:
        tiles = replace(tiles, columns=tiles.columns // 2)
    return replace(tiles, stages=max(min(tiles.stages, limit // stage_bytes(tiles, row)), 1))


def stage_bytes(tiles: Tiles, row: Row) -> int:
    """Shared memory of one buffer of the pipeline."""
    return (tiles.rows + tiles.columns) * tiles.inner * row.itemsize


def shared_memory() -> int | None:
    """Bytes that the pipeline of one program may have; None in the interpreter, for no limit."""
    if triton.knobs.runtime.interpret:
        return None
    target = triton.runtime.driver.active.get_current_target()
    return SHARED_MEMORY.get(target.arch, LEAST_SHARED_MEMORY) - RESERVED


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must widen what it loads: the interpreter has no bfloat16 arithmetic."""
    return triton.knobs.runtime.interpret and dtype == torch.bfloat16
