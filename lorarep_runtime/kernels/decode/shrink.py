"""LoRA's shrink, shrunk = A x, in the Triton kernels that make x. `entry_table` defines shrunk, parts and entry tables.

A program computes one part of one row's shrunk. Where ranks are many, several programs share them in rank blocks: some
ranks of a module, or the ranks of all modules if they are few. A program follows three addresses to its piece of A
(row, table, entry). No kernel of a step writes any of them, so it follows them before it waits for the previous kernel:
programmatic dependent launch, from Hopper on.

A step's positions are a slice of a larger tensor, aligned or not. Kernels do not specialize on that: Triton would
compile each of them twice.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.entry_table import DecodeRows, part_width
from lorarep_runtime.kernels.triton_entries import ENTRY_FIELDS, FIELD_RANK

MOST_RANK_PROGRAMS = 8
"""Programs that share the ranks of a row and a part."""


def shrink_grid(shrunk: Tensor) -> tuple[int, int, int]:
    """The grid of a kernel that makes x and its shrunk, fp32 (rows, parts, packed modules, ranks)."""
    rows, parts, _, ranks = shrunk.shape
    block = _rank_block(shrunk)
    return rows, parts, min(MOST_RANK_PROGRAMS, ranks // block) if ranks % block == 0 else 1


def shrink_options(shrunk: Tensor, width: int, rows: DecodeRows, first: int) -> dict[str, Any]:
    """Launch arguments of a kernel that makes x of `width` columns and its shrunk.

    Args:
        shrunk: fp32 (rows, parts, packed modules, ranks).
        first: number of the first of the packed modules.
    """
    _, parts, count, ranks = shrunk.shape
    part, ranks_at_once = part_width(width, parts), _rank_block(shrunk)
    block = triton.next_power_of_2(part)
    return dict(
        WIDTH=width,
        PART=part,
        BLOCK=block,
        MODULES=rows.modules,
        FIRST=first,
        COUNT=count,
        RANKS=ranks,
        RANK_BLOCK=ranks_at_once,
        num_warps=max(4, min(16, ranks_at_once * block // 2048)),
    )


def _rank_block(shrunk: Tensor) -> int:
    """Ranks, of all packed modules one after the other, that a program takes at a time."""
    _, _, count, ranks = shrunk.shape
    return triton.next_power_of_2(count * ranks) if ranks <= 8 else 8


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Lets the next kernel begin, and returns when the previous one is done and its memory visible.

    Every program must call this. Otherwise a kernel could end, and the next proceed, before the previous one has ended.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def part_columns(part, WIDTH: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of x in a part, (BLOCK) int32, and a mask of those that exist."""
    inner = tl.arange(0, BLOCK)
    columns = part * PART + inner
    return columns, (inner < PART) & (columns < WIDTH)


@triton.jit
def entries_of_row(adapters, row, position, MODULES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The addresses of A, int64, and the ranks, int32, of a row's packed modules. A rank is 0 where there is no entry.

    Both have COUNT elements, rounded up to a power of two.
    """
    module = tl.arange(0, triton.next_power_of_2(COUNT))
    table = tl.load(adapters + row)
    present = module < tl.where((table != 0) & (position >= 0), COUNT, 0)
    entry = table.to(tl.pointer_type(tl.int64)) + (position * MODULES + FIRST + module) * ENTRY_FIELDS
    return tl.load(entry, mask=present, other=0), tl.load(entry + FIELD_RANK, mask=present, other=0).to(tl.int32)


@triton.jit
def load_ranks(
    addresses,
    ranks,
    block,
    columns,
    inside,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """A block of ranks of A, (RANK_BLOCK, BLOCK), 0 beyond a module's rank; and a mask of those that exist."""
    stacked = block * RANK_BLOCK + tl.arange(0, RANK_BLOCK)  # ranks of all modules, one after the other
    own = (stacked // RANKS)[:, None] == tl.arange(0, triton.next_power_of_2(COUNT))[None, :]
    A = tl.sum(tl.where(own, addresses[None, :], 0), 1).to(tl.pointer_type(dtype))
    there = stacked % RANKS < tl.sum(tl.where(own, ranks[None, :], 0), 1)
    at = tl.multiple_of(A, 16)[:, None] + (stacked % RANKS * WIDTH)[:, None] + columns[None, :]
    return tl.load(at, mask=there[:, None] & inside[None, :], other=0), there


@triton.jit
def idle(position, ranks, RANK_BLOCK: tl.constexpr):
    """Whether a program has nothing to do: the row passes through, or other programs have all of its ranks."""
    program = tl.program_id(2)
    return (position < 0) | ((program > 0) & (program * RANK_BLOCK >= tl.max(ranks, 0)))


@triton.jit
def write_shrunk(
    shrunk,
    x,
    a,
    there,
    addresses,
    ranks,
    columns,
    inside,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """Stores this program's ranks of its part of shrunk.

    Args:
        shrunk: fp32 (rows, parts, packed modules, ranks).
        x: (BLOCK), 0 where not `inside`.
        a, there: the first of this program's rank blocks (`load_ranks`), loaded early.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    shrunk += (row * tl.num_programs(1) + part) * COUNT * RANKS
    blocks: tl.constexpr = (COUNT * RANKS + RANK_BLOCK - 1) // RANK_BLOCK
    for block in range(tl.program_id(2), tl.where(tl.max(ranks, 0) > 0, blocks, 0), tl.num_programs(2)):
        current, current_there = a, there
        next_block = block + tl.num_programs(2)
        a, there = load_ranks(addresses, ranks, next_block, columns, inside, x.dtype, WIDTH, COUNT, RANKS, RANK_BLOCK)
        sums = tl.sum(current.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        tl.store(shrunk + block * RANK_BLOCK + tl.arange(0, RANK_BLOCK), sums, mask=current_there)
