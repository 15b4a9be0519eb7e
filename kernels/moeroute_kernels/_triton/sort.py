"""Slots in the order of their experts, on the device: a stable counting sort.

Up to one block of slots is sorted by one program. More are counted block by block, the counts are
summed up per expert, and every block then places its own slots. No size depends on the routing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeroute_kernels._triton.tiles import TileMap, most_tiles, tile_map

TINY_BLOCK = 64
BLOCK = 1024
"""Slots of one program; a key is id * block + position and must fit 31 bits."""
SCAN_ROWS = 64
SCAN_COLUMNS = 32


@triton.jit
def sorted_block(ids_ptr, start, N, E, BLOCK: tl.constexpr):
    """Ids of one block (empty slots E, beyond the end E + 1), and its keys in order."""
    position = tl.arange(0, BLOCK)
    slot = start + position
    inside = slot < N
    ids = tl.load(ids_ptr + slot, mask=inside, other=-1).to(tl.int64)
    filled = (ids >= 0) & (ids < E)
    ids = tl.where(filled, ids, tl.where(inside, E, E + 1)).to(tl.int32)
    return ids, tl.sort(ids * BLOCK + position)


@triton.jit(do_not_specialize=["N", "num_tiles"])
def sort_one_kernel(
    ids_ptr,
    order_ptr,
    inverse_ptr,
    ends_ptr,
    tile_experts_ptr,
    tile_starts_ptr,
    N,
    E,
    num_tiles,
    HAS_TILES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ids, keys = sorted_block(ids_ptr, 0, N, E, BLOCK)
    row = tl.arange(0, BLOCK)
    slot = keys % BLOCK
    tl.store(order_ptr + row, slot.to(tl.int64), mask=row < N)
    tl.store(inverse_ptr + slot, row.to(tl.int64), mask=row < N)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(ids, BINS)
    ends = tl.cumsum(counts, 0)
    tl.store(ends_ptr + bins, ends, mask=bins < E)
    if HAS_TILES:
        expert = keys // BLOCK
        first = tl.gather(ends - counts, expert, 0)
        opens = (expert < E) & ((row - first) % TILE_ROWS == 0)
        tile = tl.cumsum(opens.to(tl.int32), 0) - 1
        tl.store(tile_experts_ptr + tile, expert, mask=opens)
        tl.store(tile_starts_ptr + tile, row, mask=opens)
        surplus = (row >= tl.sum(opens.to(tl.int32), 0)) & (row < num_tiles)
        tl.store(tile_experts_ptr + row, tl.full((BLOCK,), -1, tl.int32), mask=surplus)


@triton.jit(do_not_specialize=["N"])
def count_kernel(ids_ptr, counts_ptr, N, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + slot, mask=slot < N, other=-1).to(tl.int64)
    ids = tl.where((ids >= 0) & (ids < E), ids, tl.where(slot < N, E, E + 1)).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + block * BINS + bins, tl.histogram(ids, BINS))


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(
    counts_ptr,
    totals_ptr,
    num_blocks,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Turn the counts of each block into the sum over the blocks before it; keep the totals."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS,), dtype=tl.int32)
    for start in range(0, num_blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        pointers = counts_ptr + row[:, None] * BINS + column[None, :]
        inside = (row < num_blocks)[:, None]
        counts = tl.load(pointers, mask=inside, other=0)
        tl.store(pointers, before[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + column, before)


@triton.jit(do_not_specialize=["N"])
def place_kernel(
    ids_ptr,
    counts_ptr,
    totals_ptr,
    order_ptr,
    inverse_ptr,
    ends_ptr,
    N,
    E,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    start = block * BLOCK
    ids, keys = sorted_block(ids_ptr, start, N, E, BLOCK)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins)
    ends = tl.cumsum(totals, 0)
    tl.store(ends_ptr + bins, ends, mask=(bins < E) & (block == 0))
    counts = tl.histogram(ids, BINS)
    first_row = ends - totals + tl.load(counts_ptr + block * BINS + bins)
    shift = first_row - (tl.cumsum(counts, 0) - counts)
    position = tl.arange(0, BLOCK)
    row = position + tl.gather(shift, keys // BLOCK, 0)
    slot = start + keys % BLOCK
    inside = start + position < N
    tl.store(order_ptr + row, slot.to(tl.int64), mask=inside)
    tl.store(inverse_ptr + slot, row.to(tl.int64), mask=inside)


def sort_slots(ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort slots by expert; see `moeroute_kernels.expert_sort.sort_slots`."""
    return _sort(ids, num_groups, None)


def sort_and_tile(
    ids: Tensor, num_groups: int, block_rows: int
) -> tuple[Tensor, Tensor, Tensor, TileMap]:
    """Sort slots by expert and lay tiles over their rows: few slots take one launch for both.

    Args:
        ids: (T, K) integers, any strides; anything outside [0, num_groups) is an empty slot.
        num_groups: E.
        block_rows: Most rows of a tile.

    Returns:
        What `sort_slots` returns, and the tiles.
    """
    num_slots = ids.numel()
    if num_slots > BLOCK:
        order, inverse, ends = _sort(ids, num_groups, None)
        return order, inverse, ends, tile_map(ends, num_slots, block_rows)
    most = most_tiles(num_slots, num_groups, block_rows)
    experts = torch.empty((most,), dtype=torch.int32, device=ids.device)
    starts = torch.empty_like(experts)
    ends = torch.empty((num_groups,), dtype=torch.int32, device=ids.device)
    tiles = TileMap(experts, starts, ends, block_rows)
    order, inverse, _ = _sort(ids, num_groups, tiles)
    return order, inverse, ends, tiles


def _sort(ids: Tensor, num_groups: int, tiles: TileMap | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sort; with tiles, whose slots fit one block, fill them and their ends as well."""
    flat = ids.reshape(-1)
    num_slots = flat.shape[0]
    order = torch.empty((num_slots,), dtype=torch.int64, device=ids.device)
    inverse = torch.empty_like(order)
    bins = max(triton.next_power_of_2(num_groups + 2), SCAN_COLUMNS)
    if num_slots > BLOCK:
        ends = torch.empty((num_groups,), dtype=torch.int32, device=ids.device)
        _sort_blocks(flat, order, inverse, ends, bins)
        return order, inverse, ends
    has_tiles = tiles is not None
    if tiles is None:
        ends = torch.empty((num_groups,), dtype=torch.int32, device=ids.device)
        tiles = TileMap(ends, ends, ends, 1)
    sort_one_kernel[(1,)](
        flat,
        order,
        inverse,
        tiles.ends,
        tiles.experts,
        tiles.starts,
        num_slots,
        num_groups,
        tiles.experts.shape[0],
        HAS_TILES=has_tiles,
        TILE_ROWS=tiles.block_rows,
        BINS=bins,
        BLOCK=TINY_BLOCK if num_slots <= TINY_BLOCK else BLOCK,
    )
    return order, inverse, tiles.ends


def _sort_blocks(flat: Tensor, order: Tensor, inverse: Tensor, ends: Tensor, bins: int) -> None:
    num_slots, num_groups = flat.shape[0], ends.shape[0]
    blocks = triton.cdiv(num_slots, BLOCK)
    counts = torch.empty((blocks, bins), dtype=torch.int32, device=flat.device)
    totals = torch.empty((bins,), dtype=torch.int32, device=flat.device)
    count_kernel[(blocks,)](flat, counts, num_slots, num_groups, bins, BLOCK)
    scan_kernel[(bins // SCAN_COLUMNS,)](counts, totals, blocks, bins, SCAN_ROWS, SCAN_COLUMNS)
    place_kernel[(blocks,)](
        flat, counts, totals, order, inverse, ends, num_slots, num_groups, bins, BLOCK
    )
