"""low = A x beside the kernels that make x: what they share in Triton. `rows` says what low and entry tables are.

A program has one row and one part of x. It has to follow three addresses to get at its piece of A (row, table, entry,
A), none of which any kernel of a step writes. So it does that first and waits for the kernel before it only then, if
that is still running: programmatic dependent launch, from Hopper on.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.rows import FIELDS, Rows, part_width

ENTRY_FIELDS: tl.constexpr = tl.constexpr(FIELDS)


def low_options(low: Tensor, width: int, rows: Rows, first: int) -> dict[str, Any]:
    """What a kernel that makes x of `width` is launched with for its low."""
    _, parts, count, ranks = low.shape
    part = part_width(width, parts)
    block = triton.next_power_of_2(part)
    rank_block = 8 if ranks <= 8 else 16
    lanes = triton.next_power_of_2(count) * rank_block
    return dict(
        WIDTH=width,
        PART=part,
        BLOCK=block,
        MODULES=rows.modules,
        FIRST=first,
        COUNT=count,
        RANKS=ranks,
        RANK_BLOCK=rank_block,
        LANES=lanes,
        num_warps=max(4, min(16, lanes * block // 2048)),
    )


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Returns when the kernel before is done and its memory visible; then the one after may begin as this one did.

    Every program must come here, or a kernel could end, and the next go on, before the one before it has ended.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def part_columns(part, WIDTH: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of x in a part, and which of them exist."""
    lane = tl.arange(0, BLOCK)
    columns = part * PART + lane
    return columns, (lane < PART) & (columns < WIDTH)


@triton.jit
def group_rows(
    adapters,
    row,
    position,
    dtype: tl.constexpr,
    MODULES: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """For each module of a group, RANK_BLOCK times over: the address of its A, and its rank."""
    module = tl.arange(0, LANES) // RANK_BLOCK
    table = tl.load(adapters + row)
    present = module < tl.where((table != 0) & (position >= 0), COUNT, 0)
    entry = table.to(tl.pointer_type(tl.int64)) + (position * MODULES + FIRST + module) * ENTRY_FIELDS
    address = tl.load(entry, mask=present, other=0)
    rank = tl.load(entry + 4, mask=present, other=0).to(tl.int32)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16), rank


@triton.jit
def load_ranks(A, rank, start, columns, inside, WIDTH: tl.constexpr, RANK_BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(LANES, BLOCK): a block of ranks of each module's A; 0 beyond a module's rank."""
    j = start + tl.arange(0, LANES) % RANK_BLOCK
    return tl.load(
        A[:, None] + j[:, None] * WIDTH + columns[None, :], mask=(j < rank)[:, None] & inside[None, :], other=0
    )


@triton.jit
def write_low(
    low,
    x,
    a,
    A,
    rank,
    columns,
    inside,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Stores a part of low.

    Args:
        low: address of the part, (modules, ranks).
        x: (BLOCK), 0 where not `inside`.
        a: the first block of ranks, loaded early.
    """
    lane = tl.arange(0, LANES)
    for start in range(0, tl.max(rank, 0), RANK_BLOCK):
        current = a
        a = load_ranks(A, rank, start + RANK_BLOCK, columns, inside, WIDTH, RANK_BLOCK, LANES)
        sums = tl.sum(current.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        j = start + lane % RANK_BLOCK
        tl.store(low + lane // RANK_BLOCK * RANKS + j, sums, mask=j < rank)
