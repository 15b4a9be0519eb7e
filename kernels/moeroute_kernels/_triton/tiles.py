"""Tiles of rows: which expert and rows each program of a grouped product works on.

A tile never spans two experts. Their number depends on the routing, so the map has as many entries
as there can be at most, which the host knows; the surplus says -1 and its programs return at once.
Very few slots are not sorted at all: each is a tile of one row, and the ids are the map.

Axes: N rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAP_BLOCK = 32
SURPLUS = tl.constexpr(-1)


@dataclass(frozen=True, slots=True)
class TileMap:
    """One entry a tile.

    Attributes:
        experts: (M,) int32, the expert; E for rows of empty slots, -1 for no tile. Without starts,
            (N,) ids of any integer dtype, one a row; those outside [0, E) are empty slots.
        starts: (M,) int32, the first row; None if tile m is row m alone.
        ends: (E,) int32, the inclusive ends of the experts' rows; None with starts.
        block_rows: Most rows of a tile.
    """

    experts: Tensor
    starts: Tensor | None
    ends: Tensor | None
    block_rows: int


def most_tiles(num_rows: int, num_groups: int, block_rows: int) -> int:
    """How many tiles there are at most, whatever the routing."""
    if num_rows <= num_groups:
        return num_rows
    return num_groups - 1 + triton.cdiv(num_rows - num_groups + 1, block_rows)


@triton.jit(do_not_specialize=["N", "num_tiles"])
def tile_map_kernel(
    ends_ptr,
    experts_ptr,
    starts_ptr,
    N,
    E,
    num_tiles,
    TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    groups = tl.arange(0, BINS)
    last = tl.load(ends_ptr + E - 1)
    ends = tl.load(ends_ptr + groups, mask=groups < E, other=0)
    ends = tl.where(groups < E, ends, N if TAIL else last)
    before = tl.load(ends_ptr + groups - 1, mask=(groups > 0) & (groups <= E), other=0)
    before = tl.where(groups <= E, before, ends)
    tiles = (ends - before + BLOCK_ROWS - 1) // BLOCK_ROWS
    tile_ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    real = group < BINS
    group = tl.where(real, group, 0)
    first = tl.gather(tile_ends - tiles, group, 0)
    start = tl.gather(before, group, 0) + (tile - first) * BLOCK_ROWS
    inside = tile < num_tiles
    tl.store(experts_ptr + tile, tl.where(real, group, SURPLUS), mask=inside)
    tl.store(starts_ptr + tile, start, mask=inside)


def tile_map(ends: Tensor, num_rows: int, block_rows: int, *, tail: bool = False) -> TileMap:
    """Lay tiles over the experts' rows.

    Args:
        ends: (E,) int32, inclusive ends.
        num_rows: N.
        block_rows: Most rows of a tile.
        tail: Lay tiles over the rows of empty slots as well, as if they were expert E's.
    """
    num_experts = ends.shape[0]
    num_tiles = most_tiles(num_rows, num_experts + tail, block_rows)
    experts = torch.empty((num_tiles,), dtype=torch.int32, device=ends.device)
    starts = torch.empty_like(experts)
    bins = triton.next_power_of_2(num_experts + 1)
    if num_tiles:
        tile_map_kernel[(triton.cdiv(num_tiles, MAP_BLOCK),)](
            ends,
            experts,
            starts,
            num_rows,
            num_experts,
            num_tiles,
            tail,
            block_rows,
            bins,
            MAP_BLOCK,
        )
    return TileMap(experts, starts, ends, block_rows)


def slot_tiles(ids: Tensor, block_rows: int) -> TileMap:
    """Make every slot a tile of its own, in the order of the slots: no launch.

    Args:
        ids: (T, K) integers; anything outside [0, E) is an empty slot.
        block_rows: Rows of the kernels' tiles, of which one is used.
    """
    return TileMap(ids.reshape(-1), None, None, block_rows)


@triton.jit
def tile_expert(experts_ptr, starts_ptr, tile, E):
    """The expert of a tile (int64): E for rows of empty slots, negative for no tile."""
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    if starts_ptr is None:
        expert = tl.where((expert >= 0) & (expert < E), expert, E)
    return expert


@triton.jit
def tile_rows(starts_ptr, ends_ptr, tile, expert, E, N, ROWS: tl.constexpr):
    """Rows of a tile (int64), and whether each is the expert's; the others repeat the first."""
    if starts_ptr is None:
        start = tile
        end = tile + 1
    else:
        start = tl.load(starts_ptr + tile)
        end = tl.load(ends_ptr + expert, mask=expert < E, other=N)
    rows = start + tl.arange(0, ROWS)
    inside = rows < end
    return tl.where(inside, rows, start).to(tl.int64), inside


@triton.jit
def slots_of(order_ptr, rows):
    """The flat slot of each row; without an order, rows are slots."""
    slots = rows
    if order_ptr is not None:
        slots = tl.load(order_ptr + rows)
    return slots
