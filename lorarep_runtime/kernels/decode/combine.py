"""The splits of `decode_attention` merged, and low = A x of the module that reads the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.decode.shrink import (
    await_previous,
    group_of_row,
    idle,
    load_ranks,
    low_grid,
    low_options,
    part_columns,
    write_low,
)
from lorarep_runtime.kernels.entry_table import PlainRows, Rows, write_low_reference


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
        shape = (rows, heads, splits)
        return cls(*(torch.empty(s, dtype=torch.float32, device=device) for s in (shape, shape, (*shape, head_dim))))


def combine_low(partials: Partials, out: Tensor, low: Tensor, rows: Rows, first: int, *, pdl: bool = False) -> None:
    """Merges attention over parts of a sequence (Dao et al., 2023).

    All tensors are contiguous.

    Args:
        out: (rows, heads · head_dim), in the dtype of the activations, written.
        low: fp32 (rows, parts, 1, ranks), written.
        first: number of the module that reads `out`.
        pdl: begin while the kernel before ends (`low`).
    """
    splits, head_dim = partials.values.shape[2:]
    _combine_low[low_grid(low)](
        *partials,
        out,
        low,
        rows.positions,
        rows.adapters,
        DIM=head_dim,
        SPLITS=splits,
        PDL=pdl,
        launch_pdl=pdl,
        **low_options(low, out.shape[1], rows, first),
    )


def combine_low_reference(partials: Partials, out: Tensor, low: Tensor, rows: PlainRows, first: int) -> None:
    for row, _ in rows.walking():
        maxima, sums, values = (p[row] for p in partials)
        weights = (maxima - maxima.amax(1, keepdim=True)).exp()
        # A split without tokens has a weight of 0, and 0 times its values may be NaN.
        total = (weights.unsqueeze(2) * values).masked_fill(weights.unsqueeze(2) == 0, 0).sum(1)
        out[row] = (total / (weights * sums).sum(1, keepdim=True)).flatten().to(out.dtype)
    write_low_reference(out, low, rows, first)


@triton.jit(do_not_specialize=["positions"])
def _combine_low(
    maxima,
    sums,
    values,
    out,
    low,
    positions,
    adapters,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    MODULES: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype = out.dtype.element_ty
    position = tl.load(positions + row)
    columns, inside = part_columns(part, WIDTH, PART, BLOCK)
    addresses, ranks = group_of_row(adapters, row, position, MODULES, FIRST, COUNT)
    a, there = load_ranks(addresses, ranks, tl.program_id(2), columns, inside, dtype, WIDTH, COUNT, RANKS, LANES)
    await_previous(PDL)
    if idle(position, ranks, LANES):
        return
    # Every column takes its head's numbers, rather than every head its columns: a part need not be whole heads.
    at = (row * (WIDTH // DIM) + columns // DIM) * SPLITS
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        largest = tl.maximum(largest, tl.load(maxima + at + split, mask=inside, other=0))
    total = tl.zeros([BLOCK], tl.float32)
    value = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.exp(tl.load(maxima + at + split, mask=inside, other=0) - largest)
        total += weight * tl.load(sums + at + split, mask=inside, other=1)
        part_value = tl.load(values + (at + split) * DIM + columns % DIM, mask=inside, other=0)
        value += tl.where(weight > 0, weight * part_value, 0.0)
    own_x = (value / total).to(dtype)
    tl.store(out + row * WIDTH + columns, own_x, mask=inside & (columns < tl.where(tl.program_id(2) == 0, WIDTH, 0)))
    write_low(low, own_x, a, there, addresses, ranks, columns, inside, WIDTH, COUNT, RANKS, LANES)
