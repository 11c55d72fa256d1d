"""LoRA's expand: y = c ⊙ (W x) + B (A x) + b of packed modules, each row with the c, B and b of its own adapter.

Bases without a decode GEMM of their own use it after a library's W x. The kernel that makes x makes shrunk = A x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.kernels.decode.shrink import await_previous
from lorarep_runtime.kernels.entry_table import DecodeRows, ReferenceRows
from lorarep_runtime.kernels.triton_entries import ENTRY_FIELDS, FIELD_B, FIELD_BIAS, FIELD_C, FIELD_RANK

BLOCK = 512
RANK_BLOCK: tl.constexpr = tl.constexpr(8)


def expand(
    y: Tensor,
    shrunk: Tensor,
    sizes: Sequence[int],
    rows: DecodeRows,
    first: int,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    terms: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Adapts W x in place, in fp32 and rounded once; or adds the adapted W x to a residual in place.

    All tensors are contiguous; y, bias and residual have the dtype of the activations.

    Args:
        y: (rows, outputs of all packed modules), W x on entry where there are no terms. Written where there is no
            residual.
        shrunk: fp32 (rows, parts, packed modules, ranks).
        sizes: outputs of each module.
        first: number of the first of the packed modules.
        bias: (outputs), the base's own; None is 0.
        residual: (rows, outputs). Written; rows without a position keep theirs.
        terms: fp32 (n, rows, outputs), which are added up in order to W x.
        pdl: begin while the previous kernel ends (programmatic dependent launch).
    """
    _, parts, _, ranks = shrunk.shape
    _expand_rows[(len(y), len(sizes), triton.cdiv(max(sizes), BLOCK))](
        y,
        shrunk,
        bias,
        residual,
        terms,
        rows.positions,
        rows.adapters,
        SIZES=tuple(sizes),
        COUNT=len(sizes),
        MODULES=rows.modules,
        FIRST=first,
        PARTS=parts,
        BLOCK_PARTS=triton.next_power_of_2(parts),
        RANKS=ranks,
        BLOCK=BLOCK,
        TERMS=0 if terms is None else len(terms),
        PDL=pdl,
        num_warps=2,  # eight outputs a thread, so that ranks are added up without leaving it
        launch_pdl=pdl,
    )


def expand_reference(
    y: Tensor,
    shrunk: Tensor,
    sizes: Sequence[int],
    rows: ReferenceRows,
    first: int,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    terms: Tensor | None = None,
) -> None:
    for row, _ in rows.active():
        adapted = y[row].to(torch.float32, copy=True) if terms is None else terms[:, row].sum(0)
        for module, own in enumerate(adapted.split(list(sizes))):
            entry = rows.entry(row, first + module)
            if entry is None:
                continue
            if entry.c is not None:
                own *= entry.c
            own += entry.B.float() @ shrunk[row, :, module, : len(entry.A)].sum(0)
            if entry.bias is not None:
                own += entry.bias
        if bias is not None:
            adapted += bias
        if residual is None:
            y[row] = adapted
        else:
            residual[row] = residual[row] + adapted


@triton.jit
def _load_ranks(B, rank, start, size, o):
    """A block of ranks of Bᵀ, (RANK_BLOCK, BLOCK), 0 beyond the rank."""
    j = start + tl.arange(0, RANK_BLOCK)
    return tl.load(B + j[:, None] * size + o[None, :], mask=(j < rank)[:, None] & (o < size)[None, :], other=0)


@triton.jit
def _load_vector(entry, field: tl.constexpr, present, size, o, other: tl.constexpr, dtype: tl.constexpr):
    """c or bias of an entry in fp32; `other` where its address is 0."""
    address = tl.load(entry + field, mask=present, other=0)
    vector = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    return tl.load(vector + o, mask=o < tl.where(address != 0, size, 0), other=other).to(tl.float32)


@triton.jit(do_not_specialize=["positions"])
def _expand_rows(
    y,
    shrunk,
    bias,
    residual,
    terms,
    positions,
    adapters,
    SIZES: tl.constexpr,
    COUNT: tl.constexpr,
    MODULES: tl.constexpr,
    FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
    PDL: tl.constexpr,
):
    row, module = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype = y.dtype.element_ty
    size, offset, total = 0, 0, 0
    for i in tl.static_range(COUNT):
        size = tl.where(module == i, SIZES[i], size)
        offset += tl.where(module > i, SIZES[i], 0)
        total += SIZES[i]
    o = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + row)
    table = tl.load(adapters + row)
    present = (table != 0) & (position >= 0)
    if residual is None and bias is None and terms is None:  # noqa: SIM102, one is known when the kernel is compiled
        if not present:
            return
    entry = table.to(tl.pointer_type(tl.int64)) + (position * MODULES + FIRST + module) * ENTRY_FIELDS
    B = tl.multiple_of(tl.load(entry + FIELD_B, mask=present, other=0).to(tl.pointer_type(dtype)), 16)
    rank = tl.load(entry + FIELD_RANK, mask=present, other=0).to(tl.int32)
    B_block = _load_ranks(B, rank, 0, size, o)
    c = _load_vector(entry, FIELD_C, present, size, o, 1.0, dtype)
    b = _load_vector(entry, FIELD_BIAS, present, size, o, 0.0, dtype)
    if bias is not None:
        b += tl.load(bias + offset + o, mask=o < size, other=0).to(tl.float32)
    await_previous(PDL)
    # A row that passes through is neither read nor written.
    inside = o < tl.where(position >= 0, size, 0)
    at = row * total + offset + o
    if terms is None:
        plain = tl.load(y + at, mask=inside, other=0).to(tl.float32)
    else:
        plain = tl.load(terms + at, mask=inside, other=0)
        for i in tl.static_range(1, TERMS):
            plain += tl.load(terms + i * tl.num_programs(0) * total + at, mask=inside, other=0)
    adapted = c * plain + b
    part = tl.arange(0, BLOCK_PARTS)
    shrunk += ((row * PARTS + part) * COUNT + module)[:, None] * RANKS
    for start in range(0, rank, RANK_BLOCK):
        current = B_block
        B_block = _load_ranks(B, rank, start + RANK_BLOCK, size, o)
        j = start + tl.arange(0, RANK_BLOCK)
        partial = tl.load(shrunk + j[None, :], mask=(part < PARTS)[:, None] & (j < rank)[None, :], other=0)
        adapted += tl.sum(current.to(tl.float32) * tl.sum(partial, 0)[:, None], 0)
    if residual is not None:
        adapted += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        tl.store(residual + at, adapted.to(dtype), mask=inside)
    else:
        tl.store(y + at, adapted.to(dtype), mask=inside)
