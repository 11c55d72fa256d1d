"""The merge of attention's splits (Flash-Decoding, Dao et al., 2023), and shrunk = A x of the module that reads it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.decode.merge import merge
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

SPLITS_AT_ONCE = (16, 4, 1)
"""Splits that a program loads together: for each of these numbers the kernel is compiled."""


class Partials(NamedTuple):
    """Attention over the tokens of each split, fp32. A split without tokens has maximum -inf, sum 0, and no values."""

    maxima: Tensor
    """(rows, heads, splits), the largest score."""
    sums: Tensor
    """(rows, heads, splits), Σ exp(score - maximum)."""
    values: Tensor
    """(rows, heads, splits, head_dim), Σ exp(score - maximum) · v."""

    @classmethod
    def empty(cls, rows: int, heads: int, splits: int, head_dim: int, device: torch.device) -> Partials:
        """Uninitialized fp32 partials on a device, for attention over so many splits."""
        shape = (rows, heads, splits)
        return cls(*(torch.empty(s, dtype=torch.float32, device=device) for s in (shape, shape, (*shape, head_dim))))


def combine_shrink(
    partials: Partials, out: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, pdl: bool = False
) -> None:
    """Merges attention over the splits of each sequence.

    All tensors are contiguous.

    Args:
        partials: of each split, as `attend` writes them.
        out: (rows, heads · head_dim), in the dtype of the activations, written.
        shrunk: fp32 (rows, parts, 1, ranks), written.
        first: number of the module that reads `out`.
        pdl: begin while the previous kernel ends (programmatic dependent launch).
    """
    splits, head_dim = partials.values.shape[2:]
    _combine_shrink[shrink_grid(shrunk)](
        *partials,
        out,
        shrunk,
        rows.positions,
        rows.adapters,
        splits,
        DIM=head_dim,
        AT_ONCE=next(count for count in SPLITS_AT_ONCE if splits >= count // 2),
        PDL=pdl,
        launch_pdl=pdl,
        **shrink_options(shrunk, out.shape[1], rows, first),
    )


def combine_shrink_reference(partials: Partials, out: Tensor, shrunk: Tensor, rows: ReferenceRows, first: int) -> None:
    for row, _ in rows.active():
        maxima, sums, values = (p[row] for p in partials)
        weights = (maxima - maxima.amax(1, keepdim=True)).exp()
        # A split without tokens has a weight of 0, and 0 times its values may be NaN.
        total = (weights.unsqueeze(2) * values).masked_fill(weights.unsqueeze(2) == 0, 0).sum(1)
        out[row] = (total / (weights * sums).sum(1, keepdim=True)).flatten().to(out.dtype)
    shrink_reference(out, shrunk, rows, first)


@triton.jit(do_not_specialize=["positions", "splits"])
def _combine_shrink(
    maxima,
    sums,
    values,
    out,
    shrunk,
    positions,
    adapters,
    splits,
    DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
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
    dtype = out.dtype.element_ty
    position = tl.load(positions + row)
    columns, inside = part_columns(part, WIDTH, PART, BLOCK)
    addresses, ranks = entries_of_row(adapters, row, position, MODULES, FIRST, COUNT)
    a, there = load_ranks(addresses, ranks, tl.program_id(2), columns, inside, dtype, WIDTH, COUNT, RANKS, RANK_BLOCK)
    await_previous(PDL)
    if idle(position, ranks, RANK_BLOCK):
        return
    # Every column takes its head's numbers, rather than every head its columns: a part need not be whole heads.
    at = (row * (WIDTH // DIM) + columns // DIM) * splits
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            split = begin + i
            present = inside & (columns < tl.where(split < splits, WIDTH, 0))
            own_maximum = tl.load(maxima + at + split, mask=present, other=float("-inf"))
            own_maximum = tl.where(inside, own_maximum, 0.0)
            own_total = tl.load(sums + at + split, mask=present, other=0)
            own_value = tl.load(values + (at + split) * DIM + columns % DIM, mask=present, other=0)
            # A split without tokens has no values: whatever lies there may be NaN.
            own_value = tl.where(own_maximum == float("-inf"), 0.0, own_value)
            maximum, total, value = merge(maximum, total, value, own_maximum, own_total, own_value)
    own_x = (value / tl.where(inside, total, 1.0)).to(dtype)
    tl.store(out + row * WIDTH + columns, own_x, mask=inside & (columns < tl.where(tl.program_id(2) == 0, WIDTH, 0)))
    write_shrunk(shrunk, own_x, a, there, addresses, ranks, columns, inside, WIDTH, COUNT, RANKS, RANK_BLOCK)
