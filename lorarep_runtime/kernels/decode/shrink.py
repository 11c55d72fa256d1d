"""shrunk = A x beside the kernels that make x: what they share in Triton. `rows` says what shrunk and entry tables are.

A program has a row and a part of x, and where ranks are many, every so many blocks of them: a block is some ranks of a
module, or all of all modules if they are few. It has to follow three addresses to get at its piece of A (row, table,
entry, A), none of which any kernel of a step writes. So it does that first and waits for the kernel before it only
then, if that is still running: programmatic dependent launch, from Hopper on.

A step's positions lie amid those of others, aligned or not: Triton would compile every kernel twice that is not told
otherwise.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.entry_table import FIELDS, DecodeRows, part_width

ENTRY_FIELDS: tl.constexpr = tl.constexpr(FIELDS)
MOST_RANK_PROGRAMS = 8
"""For a row and a part."""


def shrink_grid(shrunk: Tensor) -> tuple[int, int, int]:
    """Programs of a kernel that makes x and its shrunk."""
    rows, parts, _, ranks = shrunk.shape
    lanes = _lanes(shrunk)
    return rows, parts, min(MOST_RANK_PROGRAMS, ranks // lanes) if ranks % lanes == 0 else 1


def shrink_options(shrunk: Tensor, width: int, rows: DecodeRows, first: int) -> dict[str, Any]:
    """What a kernel that makes x of `width` is launched with for its shrunk."""
    _, parts, count, ranks = shrunk.shape
    part, lanes = part_width(width, parts), _lanes(shrunk)
    block = triton.next_power_of_2(part)
    return dict(
        WIDTH=width,
        PART=part,
        BLOCK=block,
        MODULES=rows.modules,
        FIRST=first,
        COUNT=count,
        RANKS=ranks,
        LANES=lanes,
        num_warps=max(4, min(16, lanes * block // 2048)),
    )


def _lanes(shrunk: Tensor) -> int:
    """Ranks, of all modules one after the other, that a program takes at a time."""
    _, _, count, ranks = shrunk.shape
    return triton.next_power_of_2(count * ranks) if ranks <= 8 else 8


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Lets the kernel after begin as this one did, and returns when the one before is done and its memory visible.

    Every program must come here, or a kernel could end, and the next go on, before the one before it has ended.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def part_columns(part, WIDTH: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of x in a part, and which of them exist."""
    lane = tl.arange(0, BLOCK)
    columns = part * PART + lane
    return columns, (lane < PART) & (columns < WIDTH)


@triton.jit
def group_of_row(adapters, row, position, MODULES: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """For each module of a group, to the next power of two: the address of its A, and its rank, 0 where it has none."""
    module = tl.arange(0, triton.next_power_of_2(COUNT))
    table = tl.load(adapters + row)
    present = module < tl.where((table != 0) & (position >= 0), COUNT, 0)
    entry = table.to(tl.pointer_type(tl.int64)) + (position * MODULES + FIRST + module) * ENTRY_FIELDS
    return tl.load(entry, mask=present, other=0), tl.load(entry + 4, mask=present, other=0).to(tl.int32)


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
    LANES: tl.constexpr,
):
    """(LANES, BLOCK), a block of ranks of A, 0 beyond a module's; and (LANES), which of them there are."""
    lane = block * LANES + tl.arange(0, LANES)
    own = (lane // RANKS)[:, None] == tl.arange(0, triton.next_power_of_2(COUNT))[None, :]
    A = tl.sum(tl.where(own, addresses[None, :], 0), 1).to(tl.pointer_type(dtype))
    there = lane % RANKS < tl.sum(tl.where(own, ranks[None, :], 0), 1)
    at = tl.multiple_of(A, 16)[:, None] + (lane % RANKS * WIDTH)[:, None] + columns[None, :]
    return tl.load(at, mask=there[:, None] & inside[None, :], other=0), there


@triton.jit
def idle(position, ranks, LANES: tl.constexpr):
    """Whether nothing is left for a program to do: the row passes through, or has no ranks beyond other programs'."""
    program = tl.program_id(2)
    return (position < 0) | ((program > 0) & (program * LANES >= tl.max(ranks, 0)))


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
    LANES: tl.constexpr,
):
    """Stores this program's part of shrunk.

    Args:
        shrunk: (rows, parts, modules, ranks).
        x: (BLOCK), 0 where not `inside`.
        a, there: the first of this program's blocks, loaded early.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    shrunk += (row * tl.num_programs(1) + part) * COUNT * RANKS
    blocks: tl.constexpr = (COUNT * RANKS + LANES - 1) // LANES
    for block in range(tl.program_id(2), tl.where(tl.max(ranks, 0) > 0, blocks, 0), tl.num_programs(2)):
        current, current_there = a, there
        next_block = block + tl.num_programs(2)
        a, there = load_ranks(addresses, ranks, next_block, columns, inside, x.dtype, WIDTH, COUNT, RANKS, LANES)
        sums = tl.sum(current.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        tl.store(shrunk + block * LANES + tl.arange(0, LANES), sums, mask=current_there)
