"""The rows of a decode step, one new token each, as its kernels see them.

A captured graph runs for every mix of adapters and depths: shapes are all that a launch depends on, and what differs
from step to step or from row to row is read from device memory.

Kernels find an adapter through its *entry table*, int64 (positions, modules, 5). An entry holds, for one module at one
position of the adapter's stack, the addresses of A, Bᵀ, c and bias, and the rank. A rank of 0 marks a module that the
adapter leaves alone; an address of 0 stands for a c of 1 or a bias of 0. Modules have fixed numbers. Packed modules,
such as q, k and v, follow one another and share their input x.

Every GEMM needs shrunk = A x of its modules: LoRA's "shrink", which its "expand" by B follows (Punica, Chen et al.,
2023). The kernel that makes x makes shrunk too, as partial sums over parts of x's columns (a split-K): fp32 (rows,
parts, packed modules, ranks). `ranks` is a capacity; numbers at or beyond an entry's own rank are undefined. The kernel
that reads shrunk adds up the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.integers import ceil_div, round_up

ENTRY_FIELDS = 5
"""Numbers of an entry in a table: A, Bᵀ, c, bias, rank."""
MAX_MODULES = 3
"""Most modules that are packed: q, k and v."""
PART_ALIGNMENT = 64
"""A part of x begins at a multiple, so that its loads are whole cache lines."""


class Entry(NamedTuple):
    """One module at one position, in the dtype of the activations. Each tensor begins at a multiple of 16 bytes."""

    A: Tensor
    """(rank, in)"""
    B: Tensor
    """(out, rank); its transpose is contiguous."""
    c: Tensor | None
    """(out); None is 1."""
    bias: Tensor | None
    """(out); None is 0."""


Entries = Mapping[tuple[int, str], Entry]
"""An adapter: its entries by position and module."""


@dataclass(frozen=True)
class DecodeRows:
    """The adapter and the position of each row of a batch, at one visit of its plan."""

    positions: Tensor
    """(rows) int32, each row's position in its stack. -1 is none: the row passes through; kernels do not write it."""
    adapters: Tensor
    """(rows) int64, the address of the entry table of each row's adapter; 0 is no adapter."""
    modules: int
    """Modules in an entry table."""


@dataclass(frozen=True)
class ReferenceRows:
    """`DecodeRows` in host memory, for the torch references of kernels."""

    positions: Sequence[int]
    adapters: Sequence[Entries | None]
    modules: Sequence[str]

    def active(self) -> Iterator[tuple[int, int]]:
        """The rows that have a position, each with it."""
        return ((row, position) for row, position in enumerate(self.positions) if position >= 0)

    def entry(self, row: int, module: int) -> Entry | None:
        adapter = self.adapters[row]
        return None if adapter is None else adapter.get((self.positions[row], self.modules[module]))


def entry_table(entries: Iterable[tuple[str, Sequence[int], Entry]], positions: int, modules: Sequence[str]) -> Tensor:
    """The entry table of an adapter, int64 (positions, modules, 5), in host memory. The entries must outlive it.

    Args:
        entries: modules, their positions, and their entries stacked along a first dimension of each tensor.
        positions: length of the adapter's stack.
        modules: names of the modules in the order of their numbers.
    """
    table = np.zeros((positions, len(modules), ENTRY_FIELDS), dtype=np.int64)
    for module, at, several in entries:
        rows = table[:, modules.index(module)]
        for field, tensor in enumerate(several):
            if tensor is not None:
                step = tensor.stride(0) * tensor.element_size()
                rows[at, field] = tensor.data_ptr() + step * np.arange(len(at))
        rows[at, -1] = several.A.shape[1]
    return torch.from_numpy(table)


def part_width(width: int, parts: int) -> int:
    """Columns of x in each of the parts; the last parts may have fewer or none."""
    return round_up(ceil_div(width, parts), PART_ALIGNMENT)


def shrink_reference(x: Tensor, shrunk: Tensor, rows: ReferenceRows, first: int) -> None:
    """Writes the partial sums of A x of packed modules.

    Args:
        x: (rows, in).
        shrunk: fp32 (rows, parts, packed modules, ranks), written.
        first: number of the first of the packed modules.
    """
    width = part_width(x.shape[1], shrunk.shape[1])
    for row, _ in rows.active():
        for module in range(shrunk.shape[2]):
            entry = rows.entry(row, first + module)
            if entry is None:
                continue
            for part in range(shrunk.shape[1]):
                columns = slice(part * width, (part + 1) * width)
                shrunk[row, part, module, : len(entry.A)] = entry.A[:, columns].float() @ x[row, columns].float()
