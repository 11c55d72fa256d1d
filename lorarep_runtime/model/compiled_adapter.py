"""An adapter's one compiled form in memory, which all kernels read."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lorarep_runtime.device.gil import giving_way
from lorarep_runtime.integers import round_up
from lorarep_runtime.kernels.entry_table import Entry, entry_table
from lorarep_runtime.model.stack import Stack

Key = tuple[int, str]
"""Position, and path of a linear module inside its layer, such as "self_attn.q_proj"."""


class Form(NamedTuple):
    """What there is of one module at one position."""

    rank: int
    shape: tuple[int, int]
    """(out, in)"""
    has_c: bool
    has_bias: bool

    @property
    def pieces(self) -> Sequence[tuple[int, ...]]:
        """Shapes of what an entry holds in memory: A, Bᵀ, c, bias."""
        out, into = self.shape
        return (self.rank, into), (self.rank, out), *[(out,)] * (self.has_c + self.has_bias)

    @property
    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Kinds and shapes of what a file holds of it."""
        out, into = self.shape
        yield "lora_A.weight", (self.rank, into)
        yield "lora_B.weight", (out, self.rank)
        if self.has_bias:
            yield "lora_B.bias", (out,)
        if self.has_c:
            yield "lora_magnitude_vector", (out,)


Layout = Mapping[Key, Form]
"""All that an adapter consists of."""


ALIGNMENT = 64
"""Elements; every matrix begins at a multiple, so that a kernel can load it in whole cache lines."""


class Block(NamedTuple):
    """Entries of one module that are alike, side by side in memory: the A of all of them, then each Bᵀ, c and bias."""

    module: str
    positions: Sequence[int]
    form: Form
    start: int
    """Element of the storage."""

    def entries(self, storage: Tensor) -> Entry:
        """All of them as one, along a first dimension."""
        views, at = [], self.start
        for shape in self.form.pieces:
            size = len(self.positions) * aligned(shape)
            rows = storage[at : at + size].view(len(self.positions), -1)
            views.append(rows[:, : math.prod(shape)].unflatten(1, shape))
            at += size
        a, b, *rest = views
        c = rest.pop(0) if self.form.has_c else None
        return Entry(a, b.mT, c, rest.pop(0) if self.form.has_bias else None)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A compiled adapter on the device, or a mix of several: one entry for each targeted module at each position."""

    stack: Stack
    modules: tuple[str, ...]
    """All linear modules of a layer, in the order of their numbers in entry tables."""
    storage: Tensor
    """(elements), the memory of all entries."""
    blocks: Sequence[Block]
    """How they lie there."""
    table: Tensor | None
    """The entry table of `kernels.rows`, on an accelerator."""
    kind: str
    """"dora" where an entry has a c, else "lora"."""
    rank: int
    """Largest of its entries."""
    parameters: int
    """Numbers in its file."""

    @cached_property
    def entries(self) -> Mapping[Key, Entry]:
        """Views of the storage. Made for who asks: the garbage collector has to look at a thousand objects then."""
        return entries_of(self.storage, self.blocks)

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes + (0 if self.table is None else self.table.nbytes)


def aligned(shape: Sequence[int]) -> int:
    return round_up(math.prod(shape), ALIGNMENT)


def storage_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Bytes that a compiled adapter takes on the device."""
    return dtype.itemsize * _total(layout, aligned)


def file_parameters(layout: Layout) -> int:
    """Numbers in the file."""
    return _total(layout, math.prod)


def _total(layout: Layout, size: Callable[[tuple[int, ...]], int]) -> int:
    """Of all pieces. Few forms differ."""
    return sum(n * sum(map(size, form.pieces)) for form, n in Counter(layout.values()).items())


def blocks_of(layout: Layout, keys: Iterable[Key]) -> Sequence[Block]:
    """A layout's entries in memory; alike ones in the order of their keys."""
    alike: dict[tuple[str, Form], list[int]] = defaultdict(list)
    for position, module in giving_way(keys):
        alike[module, layout[position, module]].append(position)
    sizes = [len(p) * sum(map(aligned, form.pieces)) for (_, form), p in alike.items()]
    starts = accumulate(sizes, initial=0)
    return [Block(module, p, form, start) for ((module, form), p), start in zip(alike.items(), starts, strict=False)]


def allocate(blocks: Sequence[Block], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = sum(len(block.positions) * sum(map(aligned, block.form.pieces)) for block in blocks)
    return torch.zeros(size, dtype=dtype, device=device)


def entries_of(storage: Tensor, blocks: Sequence[Block]) -> dict[Key, Entry]:
    entries: dict[Key, Entry] = {}
    for block in blocks:
        views = map(Entry, *(repeat(None) if t is None else t.unbind() for t in block.entries(storage)))
        entries.update(zip(((position, block.module) for position in block.positions), views, strict=True))
    return entries


def adapter_of(
    stack: Stack,
    storage: Tensor,
    blocks: Sequence[Block],
    modules: Sequence[str],
    parameters: int,
) -> Adapter:
    kind = "dora" if any(block.form.has_c for block in blocks) else "lora"
    table = table_of(storage, blocks, stack, modules) if storage.is_cuda else None
    rank = max(block.form.rank for block in blocks)
    return Adapter(stack, tuple(modules), storage, blocks, table, kind, rank, parameters)


def table_of(storage: Tensor, blocks: Sequence[Block], stack: Stack, modules: Sequence[str]) -> Tensor:
    """The entry table of `kernels.rows`, where the storage is."""
    entries = ((block.module, block.positions, block.entries(storage)) for block in blocks)
    return entry_table(entries, len(stack), modules).to(storage.device)


def copied_to(adapter: Adapter, device: torch.device) -> Adapter:
    """A copy of an adapter in another memory; the host's is pinned where the copy comes from an accelerator."""
    source = adapter.storage
    pinned = device.type == "cpu" and source.is_cuda
    storage = torch.empty(source.shape, dtype=source.dtype, device=device, pin_memory=pinned)
    storage.copy_(source, non_blocking=True)
    table = table_of(storage, adapter.blocks, adapter.stack, adapter.modules) if storage.is_cuda else None
    return replace(adapter, storage=storage, table=table)
