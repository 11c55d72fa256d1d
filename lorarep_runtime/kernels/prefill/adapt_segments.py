"""SGMV (segmented gather matrix-vector multiplication, Punica, Chen et al., 2023): y = c ⊙ (W x) + B (A x) + b.

Rows of the same adapter follow one another: a segment. Adapters of one batch may have different ranks. Packed modules
take two launches, shrink and expand, for any number of adapters, because launches are what a prefill pass waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.integers import ceil_div
from lorarep_runtime.kernels.entry_table import MAX_MODULES, PART_ALIGNMENT, part_width
from lorarep_runtime.kernels.launch import DirectLaunch
from lorarep_runtime.kernels.triton_entries import (
    ENTRY_FIELDS,
    FIELD_B,
    FIELD_BIAS,
    FIELD_C,
    FIELD_RANK,
)

TILE_ROWS = 64
"""Most rows of a segment tile."""
PROGRAMS = 128
"""Programs that keep the device busy. More would leave more parts to add up."""
MOST_PARTS = 16
RANK_BLOCK: tl.constexpr = tl.constexpr(32)
"""Ranks, of all packed modules one after the other, that a shrinking program takes."""
OUTPUTS: tl.constexpr = tl.constexpr(128)
"""Outputs that an expanding program takes at once."""
BLOCKS: tl.constexpr = tl.constexpr(4)
"""Blocks of so many outputs that it takes, one after the other."""
RANK_STEP: tl.constexpr = tl.constexpr(16)
"""Ranks that an expanding program multiplies at once."""
ANY = ["bounds", "adapters", "positions", "first_row", "rows", "modules", "first"]
"""Arguments that kernels are not specialized on: compiling another kernel would have all requests wait."""
SHRINK_SIZES = TILE_ROWS, 128
"""ROWS and COLUMNS of the shrinking kernel."""
WARPS = 4


@dataclass(frozen=True)
class SegmentTiles:
    """Segments of rows and their adapters at one visit of a plan, cut into tiles of at most TILE_ROWS rows."""

    bounds: Tensor
    """(tiles, 2) int32, first row and end."""
    adapters: Tensor
    """(tiles) int64, the address of the adapter's entry table (`entry_table`)."""
    positions: Tensor
    """(tiles) int32, the position in the adapter's stack."""
    ranks: int
    """The largest rank of the adapters."""
    modules: int
    """Modules in an entry table."""


def adapt_segments(
    x: Tensor, y: Tensor, sizes: Sequence[int], tiles: SegmentTiles, first: int, first_row: int = 0
) -> None:
    """Adapts W x in place, summed in fp32 and rounded once. A x is rounded as x is.

    Rows that are in no tile, and outputs that an adapter leaves alone, stay as they are.

    Args:
        x: (rows, in), rows at any distance.
        y: (rows, outputs of all packed modules), contiguous, W x on entry.
        sizes: outputs of each module.
        tiles: of a batch of which x is a slice.
        first: number of the first of the packed modules.
        first_row: number of x's first row in that batch.
    """
    count, width = len(tiles.bounds), x.shape[1]
    rank_blocks = ceil_div(len(sizes) * tiles.ranks, RANK_BLOCK.value)
    parts = max(1, min(MOST_PARTS, PROGRAMS // (count * rank_blocks), width // (4 * PART_ALIGNMENT)))
    shrunk = torch.empty(len(x), parts, len(sizes), tiles.ranks, device=x.device)
    given = tiles.bounds, tiles.adapters, tiles.positions, first_row, len(x), tiles.modules, first
    widths = x.stride(0), width, part_width(width, parts)
    _launch_shrink(
        (count, rank_blocks, parts),
        (x.dtype, widths),
        *(x, shrunk, *given, *widths, len(sizes), tiles.ranks, *SHRINK_SIZES),
        num_warps=WARPS,
    )
    own_sizes = [*sizes, 0, 0][:MAX_MODULES]
    aligned = all(size % 8 == 0 for size in sizes)
    _launch_expand(
        (count, sum(ceil_div(size, OUTPUTS.value * BLOCKS.value) for size in sizes), 1),
        (y.dtype, sizes[0], aligned),
        *(y, shrunk, *given, *own_sizes, parts, len(sizes), tiles.ranks, aligned, TILE_ROWS),
        num_warps=WARPS,
    )


def compile_tiles(dtype: torch.dtype) -> None:
    """Compiles both kernels for activations of a dtype and sizes that are multiples of 16, which takes seconds."""
    given = torch.int32, torch.int64, torch.int32, 0, TILE_ROWS, 7, 0
    how = dict(grid=(1, 1, 1), num_warps=WARPS)
    _shrink.warmup(dtype, torch.float32, *given, 1024, 1024, 1024, 1, 8, *SHRINK_SIZES, **how)
    _expand.warmup(dtype, torch.float32, *given, 1024, 0, 0, 1, 1, 8, True, TILE_ROWS, **how)


@triton.jit
def _rows_of_tile(bounds, tile, first_row, rows, ROWS: tl.constexpr):
    """The rows of x and y in a tile, (ROWS) int64; a mask of those that exist; and whether any does."""
    start = tl.maximum(tl.load(bounds + 2 * tile) - first_row, 0)
    stop = tl.minimum(tl.load(bounds + 2 * tile + 1) - first_row, rows)
    row = start + tl.arange(0, ROWS)
    return row.to(tl.int64), row < stop, start < stop


@triton.jit
def _entry(adapters, positions, tile, modules, module):
    """Addresses of the entries of a tile's adapter for modules."""
    table = tl.load(adapters + tile).to(tl.pointer_type(tl.int64))
    return table + (tl.load(positions + tile) * modules + module) * ENTRY_FIELDS


@triton.jit(do_not_specialize=[*ANY, "count", "ranks"])
def _shrink(
    x,
    shrunk,
    bounds,
    adapters,
    positions,
    first_row,
    rows,
    modules,
    first,
    stride,
    width,
    part,
    count,
    ranks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Stores shrunk, fp32 (rows, parts, count, ranks): partial sums, undefined beyond an entry's rank."""
    tile = tl.program_id(0)
    row, inside, some = _rows_of_tile(bounds, tile, first_row, rows, ROWS)
    stacked = tl.program_id(1) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)  # ranks of all modules, one after the other
    module, rank = stacked // ranks, stacked % ranks
    entry = _entry(adapters, positions, tile, modules, first + module)
    A = tl.load(entry, mask=module < count, other=0).to(tl.pointer_type(x.dtype.element_ty))
    there = rank < tl.load(entry + FIELD_RANK, mask=module < count, other=0)
    if some & (tl.max(there.to(tl.int32), 0) > 0):
        begin = tl.program_id(2) * part
        end = tl.minimum(begin + part, width)
        sums = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
        for start in range(begin, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            known = (column < end)[None, :]
            x_block = tl.load(x + row[:, None] * stride + column[None, :], mask=inside[:, None] & known, other=0)
            at = tl.multiple_of(A, 16)[:, None] + rank[:, None] * width + column[None, :]
            a_block = tl.load(at, mask=there[:, None] & known, other=0)
            sums = tl.dot(x_block, tl.trans(a_block), sums, input_precision="ieee")
        to = shrunk + ((row * tl.num_programs(2) + tl.program_id(2)) * count * ranks)[:, None] + stacked[None, :]
        tl.store(to, sums, mask=inside[:, None] & there[None, :])


@triton.jit
def _vector(entry, field: tl.constexpr, o, size, other: tl.constexpr, dtype: tl.constexpr):
    """c or bias of an entry in fp32; `other` where its address is 0."""
    address = tl.load(entry + field)
    vector = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    return tl.load(vector + o, mask=o < tl.where(address != 0, size, 0), other=other).to(tl.float32)


@triton.jit
def _sum_parts(shrunk, start, rank, inside, parts, stride, ROWS: tl.constexpr):
    """Some ranks of A x, fp32 (ROWS, RANK_STEP), of partial sums that are `stride` numbers apart."""
    j = start + tl.arange(0, RANK_STEP)
    sums = tl.zeros((ROWS, RANK_STEP), tl.float32)
    for part in range(parts):
        sums += tl.load(shrunk + part * stride + j[None, :], mask=inside[:, None] & (j < rank)[None, :], other=0)
    return sums


@triton.jit
def _load_ranks(B, start, rank, o, size):
    """Some ranks of Bᵀ, (RANK_STEP, OUTPUTS)."""
    j = start + tl.arange(0, RANK_STEP)
    return tl.load(B + j[:, None] * size + o[None, :], mask=(j < rank)[:, None] & (o < size)[None, :], other=0)


@triton.jit(do_not_specialize=[*ANY, "size_2", "size_3", "parts", "count", "ranks"])
def _expand(
    y,
    shrunk,
    bounds,
    adapters,
    positions,
    first_row,
    rows,
    modules,
    first,
    size_1,
    size_2,
    size_3,
    parts,
    count,
    ranks,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    dtype = y.dtype.element_ty
    row, inside, some = _rows_of_tile(bounds, tile, first_row, rows, ROWS)
    blocks_1, blocks_2 = tl.cdiv(size_1, OUTPUTS * BLOCKS), tl.cdiv(size_2, OUTPUTS * BLOCKS)
    module = (block >= blocks_1).to(tl.int32) + (block >= blocks_1 + blocks_2).to(tl.int32)
    size = tl.where(module == 0, size_1, tl.where(module == 1, size_2, size_3))
    block -= tl.where(module == 0, 0, tl.where(module == 1, blocks_1, blocks_1 + blocks_2))
    offset = tl.where(module == 0, 0, tl.where(module == 1, size_1, size_1 + size_2))
    total = size_1 + size_2 + size_3
    if ALIGNED:  # 16 bytes are loaded at once
        size, offset, total = tl.multiple_of(size, 8), tl.multiple_of(offset, 8), tl.multiple_of(total, 8)
    entry = _entry(adapters, positions, tile, modules, first + module)
    rank = tl.load(entry + FIELD_RANK).to(tl.int32)
    if some & (rank > 0):
        B = tl.multiple_of(tl.load(entry + FIELD_B).to(tl.pointer_type(dtype)), 16)
        own_shrunk = shrunk + ((row * parts) * count + module)[:, None] * ranks
        # The first ranks, often all, are added up once for all blocks: parts take longer to read than y.
        first_ranks = _sum_parts(own_shrunk, 0, rank, inside, parts, count * ranks, ROWS).to(dtype)
        for start_output in range(block * OUTPUTS * BLOCKS, tl.minimum((block + 1) * OUTPUTS * BLOCKS, size), OUTPUTS):
            o = start_output + tl.arange(0, OUTPUTS)
            B_block = _load_ranks(B, 0, rank, o, size)
            sums = tl.dot(first_ranks, B_block, tl.zeros((ROWS, OUTPUTS), tl.float32), input_precision="ieee")
            for start in range(RANK_STEP, rank, RANK_STEP):
                own = _sum_parts(own_shrunk, start, rank, inside, parts, count * ranks, ROWS).to(dtype)
                sums = tl.dot(own, _load_ranks(B, start, rank, o, size), sums, input_precision="ieee")
            to = y + row[:, None] * total + (offset + o)[None, :]
            both = inside[:, None] & (o < size)[None, :]
            c, bias = _vector(entry, FIELD_C, o, size, 1.0, dtype), _vector(entry, FIELD_BIAS, o, size, 0.0, dtype)
            adapted = tl.load(to, mask=both, other=0).to(tl.float32) * c[None, :]
            tl.store(to, (adapted + (sums + bias[None, :])).to(dtype), mask=both)


_launch_shrink, _launch_expand = DirectLaunch(_shrink), DirectLaunch(_expand)
