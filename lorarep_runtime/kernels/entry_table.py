"""The rows of a decode step, one new token each, as its kernels see them.

A captured graph runs for every mix of adapters and depths: shapes are all that a launch depends on, and what differs
from step to step or from row to row is read from device memory.

An adapter is found there through its *entry table*, int64 (positions, modules, 5): for each module at each position of
its stack the addresses of A, Bᵀ, c and bias and the rank. A rank of 0 is a module that the adapter leaves alone; an
address of 0 is a c of 1 or a bias of 0. Modules have fixed numbers; those of one group, such as q, k and v, follow one
another and share their input x.

Every GEMM needs shrunk = A x of its modules. The kernel that makes x makes shrunk too, as partial sums over parts of x:
fp32 (rows, parts, modules in the group, ranks), where `ranks` is a capacity and numbers at or beyond an entry's own
rank are undefined. Whoever uses shrunk adds up the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FIELDS = 5
"""Numbers of an entry in a table."""
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
    """Who the rows of a batch are at one step of its plan."""

    positions: Tensor
    """(rows) int32, each row's position here; -1 is none: the row passes through, and kernels write nothing of it."""
    adapters: Tensor
    """(rows) int64, the address of the entry table of each row's adapter; 0 is no adapter."""
    modules: int
    """Modules in an entry table."""


@dataclass(frozen=True)
class ReferenceRows:
    """The same for the torch references."""

    positions: Sequence[int]
    adapters: Sequence[Entries | None]
    modules: Sequence[str]

    def walking(self) -> Iterator[tuple[int, int]]:
        """The rows that take part, each with its position."""
        return ((row, position) for row, position in enumerate(self.positions) if position >= 0)

    def entry(self, row: int, module: int) -> Entry | None:
        adapter = self.adapters[row]
        return None if adapter is None else adapter.get((self.positions[row], self.modules[module]))


def entry_table(entries: Iterable[tuple[str, Sequence[int], Entry]], positions: int, modules: Sequence[str]) -> Tensor:
    """The entry table of an adapter, in host memory. It holds addresses only: the entries must outlive it.

    Args:
        entries: each a module's at some positions, along a first dimension of its tensors.
    """
    table = np.zeros((positions, len(modules), FIELDS), dtype=np.int64)
    for module, places, several in entries:
        rows = table[:, modules.index(module)]
        for field, tensor in enumerate(several):
            if tensor is not None:
                step = tensor.stride(0) * tensor.element_size()
                rows[places, field] = tensor.data_ptr() + step * np.arange(len(places))
        rows[places, -1] = several.A.shape[1]
    return torch.from_numpy(table)


def part_width(width: int, parts: int) -> int:
    """Numbers of x in each of the parts; the last ones may have fewer or none."""
    return -(-width // (parts * PART_ALIGNMENT)) * PART_ALIGNMENT


def shrink_reference(x: Tensor, shrunk: Tensor, rows: ReferenceRows, first: int) -> None:
    """The partial sums of A x for the modules of a group.

    Args:
        x: (rows, in).
        shrunk: fp32 (rows, parts, modules in the group, ranks), written.
        first: number of the group's first module.
    """
    width = part_width(x.shape[1], shrunk.shape[1])
    for row, _ in rows.walking():
        for module in range(shrunk.shape[2]):
            entry = rows.entry(row, first + module)
            if entry is None:
                continue
            for part in range(shrunk.shape[1]):
                columns = slice(part * width, (part + 1) * width)
                shrunk[row, part, module, : len(entry.A)] = entry.A[:, columns].float() @ x[row, columns].float()
