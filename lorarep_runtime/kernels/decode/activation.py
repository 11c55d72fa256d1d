"""SiLU-gated activation (SwiGLU, Shazeer, 2020), and shrunk = A x of the module that reads it."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lorarep_runtime.integers import ceil_div
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
from lorarep_runtime.kernels.launch import DirectLaunch

BLOCK: tl.constexpr = tl.constexpr(1024)


def gate_shrink(gate_up: Tensor, x: Tensor, shrunk: Tensor, rows: DecodeRows, first: int, *, pdl: bool = False) -> None:
    """x = silu(gate) · up, rounded after each of the two operations as in `transformers`' LlamaMLP.

    All tensors are contiguous; gate_up and x have the dtype of the activations.

    Args:
        gate_up: (rows, 2 · intermediate size), the gate first.
        x: (rows, intermediate size), written.
        shrunk: fp32 (rows, parts, 1, ranks), written.
        first: number of the module that reads x.
        pdl: begin while the previous kernel ends (programmatic dependent launch).
    """
    _gate_shrink[shrink_grid(shrunk)](
        gate_up,
        x,
        shrunk,
        rows.positions,
        rows.adapters,
        PDL=pdl,
        launch_pdl=pdl,
        **shrink_options(shrunk, x.shape[1], rows, first),
    )


def gate_rows(gate_up: Tensor) -> Tensor:
    """The gated activation of a prefill pass, in place.

    Args:
        gate_up: (rows, 2 · intermediate size), contiguous, the gate first.

    Returns:
        (rows, intermediate size), a view of gate_up where the gate was.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    _launch_gate_rows((rows, ceil_div(width, BLOCK.value), 1), (gate_up.dtype, width), gate_up, width, num_warps=4)
    return gate_up[:, :width]


def gate_shrink_reference(gate_up: Tensor, x: Tensor, shrunk: Tensor, rows: ReferenceRows, first: int) -> None:
    for row, _ in rows.active():
        gate, up = gate_up[row].chunk(2)
        x[row] = F.silu(gate) * up
    shrink_reference(x, shrunk, rows, first)


@triton.jit
def _gated(gate, width, inside):
    """silu(gate) · up in the dtype of the gate: `gate` are addresses, and up lies `width` numbers behind each."""
    dtype = gate.dtype.element_ty
    up = tl.load(gate + width, mask=inside, other=0).to(tl.float32)
    value = tl.load(gate, mask=inside, other=0).to(tl.float32)
    activated = value * tl.sigmoid(value)
    return (activated.to(dtype).to(tl.float32) * up).to(dtype)


@triton.jit
def _gate_rows(gate_up, width):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = gate_up + tl.program_id(0).to(tl.int64) * 2 * width + column
    tl.store(gate, _gated(gate, width, column < width), mask=column < width)


_launch_gate_rows = DirectLaunch(_gate_rows)


@triton.jit(do_not_specialize=["positions"])
def _gate_shrink(
    gate_up,
    x,
    shrunk,
    positions,
    adapters,
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
    dtype = x.dtype.element_ty
    position = tl.load(positions + row)
    columns, inside = part_columns(part, WIDTH, PART, BLOCK)
    addresses, ranks = entries_of_row(adapters, row, position, MODULES, FIRST, COUNT)
    a, there = load_ranks(addresses, ranks, tl.program_id(2), columns, inside, dtype, WIDTH, COUNT, RANKS, RANK_BLOCK)
    await_previous(PDL)
    if idle(position, ranks, RANK_BLOCK):
        return
    own_x = _gated(gate_up + row * 2 * WIDTH + columns, WIDTH, inside)
    tl.store(x + row * WIDTH + columns, own_x, mask=inside & (columns < tl.where(tl.program_id(2) == 0, WIDTH, 0)))
    write_shrunk(shrunk, own_x, a, there, addresses, ranks, columns, inside, WIDTH, COUNT, RANKS, RANK_BLOCK)
