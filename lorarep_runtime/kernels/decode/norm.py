"""RMSNorm (Zhang and Sennrich, 2019) of each row, and shrunk = A x of the modules that read it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.decode.shrink import (
    await_previous,
    entries_of_row,
    idle,
    load_ranks,
    part_columns,
    shrink_grid,
    shrink_options,
    write_shrunk,
)
from lorarep_runtime.kernels.entry_table import DecodeRows, ReferenceRows, shrink_reference
from lorarep_runtime.kernels.rms_norm import rms_norm_reference, scale_by_weight


def norm_shrink(
    h: Tensor,
    weight: Tensor,
    eps: float,
    x: Tensor,
    shrunk: Tensor,
    rows: DecodeRows,
    first: int,
    *,
    pdl: bool = False,
) -> None:
    """x = RMSNorm of h, rounded as `transformers`' LlamaRMSNorm rounds.

    All tensors are contiguous; h, weight and x have the dtype of the activations.

    Args:
        h: (rows, hidden size).
        weight: (hidden size).
        x: (rows, hidden size), written.
        shrunk: fp32 (rows, parts, packed modules, ranks), written.
        first: number of the first of the packed modules.
        pdl: begin while the previous kernel ends (programmatic dependent launch).
    """
    width = h.shape[1]
    _norm_shrink[shrink_grid(shrunk)](
        h,
        weight,
        x,
        shrunk,
        rows.positions,
        rows.adapters,
        eps,
        ROW_BLOCK=triton.next_power_of_2(width),
        PDL=pdl,
        launch_pdl=pdl,
        **shrink_options(shrunk, width, rows, first),
    )


def norm_shrink_reference(
    h: Tensor, weight: Tensor, eps: float, x: Tensor, shrunk: Tensor, rows: ReferenceRows, first: int
) -> None:
    for row, _ in rows.active():
        x[row] = rms_norm_reference(h[row], weight, eps)
    shrink_reference(x, shrunk, rows, first)


@triton.jit(do_not_specialize=["positions"])
def _norm_shrink(
    h,
    weight,
    x,
    shrunk,
    positions,
    adapters,
    eps,
    ROW_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    MODULES: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    RANKS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    columns, inside = part_columns(part, WIDTH, PART, BLOCK)
    addresses, ranks = entries_of_row(adapters, row, position, MODULES, FIRST, COUNT)
    a, there = load_ranks(
        addresses, ranks, tl.program_id(2), columns, inside, h.dtype.element_ty, WIDTH, COUNT, RANKS, RANK_BLOCK
    )
    w = tl.load(weight + columns, mask=inside, other=0)
    await_previous(PDL)
    if idle(position, ranks, RANK_BLOCK):
        return
    # Each part takes the mean of the whole row anew: reading it again costs less than another kernel.
    every = tl.arange(0, ROW_BLOCK)
    whole = tl.load(h + row * WIDTH + every, mask=every < WIDTH, other=0).to(tl.float32)
    own = tl.load(h + row * WIDTH + columns, mask=inside, other=0).to(tl.float32)
    normed = own * tl.rsqrt(tl.sum(whole * whole, 0) / WIDTH + eps)
    own_x = scale_by_weight(normed, w)
    tl.store(x + row * WIDTH + columns, own_x, mask=inside & (columns < tl.where(tl.program_id(2) == 0, WIDTH, 0)))
    write_shrunk(shrunk, own_x, a, there, addresses, ranks, columns, inside, WIDTH, COUNT, RANKS, RANK_BLOCK)
