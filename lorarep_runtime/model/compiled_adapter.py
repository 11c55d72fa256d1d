"""The compiled form of an adapter: entries in one piece of memory, in the layout that all kernels read."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lorarep_runtime.device.gil import giving_way
from lorarep_runtime.integers import round_up
from lorarep_runtime.kernels.entry_table import Entry, entry_table
from lorarep_runtime.model.form import Form
from lorarep_runtime.model.stack import Stack

Key = tuple[int, str]
"""A position in the stack, and the path of a linear module inside its layer, such as "self_attn.q_proj"."""


HEAD, EMBEDDING = -1, -2
"""The positions of the model's head and embedding, which are in no stack: all stacks share them. The modules of such
entries are paths in the model."""
Ends = Mapping[int, tuple[str, tuple[int, int]]]
"""By `HEAD` and `EMBEDDING`, where adapters may adapt these: path and (out, in). An embedding's "in" is tokens."""


def whole_matrices(form: Form, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a file holds of entries, as it computes: whole A (..., rank, in) and B (..., out, rank), bias and c.

    Args:
        tensors: in the order of `Form.tensors`; A may be written to.
    """
    if form.experts:
        return _matrices_of_experts(form, tensors)
    a, b, *rest = tensors
    if form.has_e:
        a *= rest.pop()
    return [_block_diagonal(a, form.a_blocks), _block_diagonal(b, form.b_blocks), *rest]


def _matrices_of_experts(form: Form, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A (..., experts · rank, in) and B (..., out, experts · rank) of what a file holds, expert by expert."""
    if not form.expert_modules:
        a, b = tensors  # B has all experts' first ranks first
        return [a, b.unflatten(-1, (form.rank, form.experts)).mT.flatten(-2)]
    parts = len(form.expert_modules)
    pairs = torch.cat(tuple(tensors[1::2]), -2).unflatten(-2, (form.experts, -1))
    b = _block_diagonal(pairs, parts)  # (..., experts, out, rank)
    return [torch.cat(tuple(tensors[::2]), -2), b.transpose(-3, -2).flatten(-2)]


def _block_diagonal(blocks: Tensor, count: int) -> Tensor:
    """Matrices (..., out, in) whose blocks on the diagonal are given.

    Args:
        blocks: (..., out, in/count): the blocks of each matrix, one below the other.
        count: of blocks; 1 leaves them as they are.
    """
    if count == 1:
        return blocks
    stacked = blocks.unflatten(-2, (count, -1))
    *before, _, out, into = stacked.shape
    whole = stacked.new_zeros(*before, count, out, count, into)
    whole.diagonal(dim1=-4, dim2=-2).copy_(stacked.movedim(-3, -1))
    return whole.flatten(-2).flatten(-3, -2)


def copied_matrices(form: Form, copy: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) by which a weight in place of the base's differs from that.

    Args:
        form: a copy's, whose rank is the number of hidden numbers.
        copy: fp32 (vocab, hidden).
        base: (vocab, hidden).
    """
    difference, unit = copy - base.float(), torch.eye(form.rank, device=copy.device)
    return (difference.T, unit) if form.is_embedding else (unit, difference)


Layout = Mapping[Key, Form]
"""All entries of an adapter."""


ALIGNMENT = 64
"""Elements of which every tensor's start is a multiple, so that kernels load it in whole cache lines."""


class Block(NamedTuple):
    """Entries of one module with equal forms, contiguous in memory: A of all entries, then Bᵀ, c and bias of all."""

    module: str
    positions: Sequence[int]
    form: Form
    start: int
    """Index of the block's first element in the storage."""

    def entries(self, storage: Tensor) -> Entry:
        """All entries as one: views of the storage with the entries along a first dimension."""
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
    """(elements,), the memory of all entries, in the activations' dtype."""
    blocks: Sequence[Block]
    """Where the entries lie in the storage."""
    table: Tensor | None
    """The entry table of `kernels.entry_table`; None on a CPU."""
    kind: str
    """"dora" where an entry has a c, else "lora"."""
    rank: int
    """Largest rank of its entries."""
    parameters: int
    """Numbers in its weights file."""
    number: int = 0
    """By which several ranks call it; each has its part of it."""

    @cached_property
    def head(self) -> Entry | None:
        """What the adapter has for the model's head."""
        return self._end(HEAD)

    @cached_property
    def embedding(self) -> Entry | None:
        """What the adapter has for the model's embedding."""
        return self._end(EMBEDDING)

    def _end(self, position: int) -> Entry | None:
        found = (block.entries(self.storage) for block in self.blocks if position in block.positions)
        entry = next(found, None)
        return None if entry is None else Entry._make(None if views is None else views[0] for views in entry)

    @cached_property
    def entries(self) -> Mapping[Key, Entry]:
        """All entries, as views of the storage. Made only if asked for: they are a thousand objects to collect."""
        return entries_of(self.storage, self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage and the entry table."""
        return self.storage.nbytes + (0 if self.table is None else self.table.nbytes)


def aligned(shape: Sequence[int]) -> int:
    """Elements that a tensor takes in the storage."""
    return round_up(math.prod(shape), ALIGNMENT)


def storage_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """Bytes of the storage of a compiled adapter."""
    return dtype.itemsize * sum(n * sum(map(aligned, form.pieces)) for form, n in Counter(layout.values()).items())


def largest_rank(forms: Iterable[Form]) -> int:
    """The largest rank of an adapter's entries, copies aside."""
    return max((form.rank for form in forms if not form.is_copy), default=0)


def file_parameters(layout: Layout) -> int:
    """Numbers in the weights file of an adapter."""
    # By form, of which few differ.
    return sum(n * sum(math.prod(shape) for _, shape in form.tensors) for form, n in Counter(layout.values()).items())


def blocks_of(layout: Layout, keys: Iterable[Key]) -> Sequence[Block]:
    """Blocks for all entries of a layout; within a block the entries keep the order of the keys."""
    alike: dict[tuple[str, Form], list[int]] = defaultdict(list)
    for position, module in giving_way(keys):
        alike[module, layout[position, module]].append(position)
    sizes = [len(p) * sum(map(aligned, form.pieces)) for (_, form), p in alike.items()]
    starts = accumulate(sizes, initial=0)
    return [Block(module, p, form, start) for ((module, form), p), start in zip(alike.items(), starts, strict=False)]


def is_finite(storage: Tensor) -> bool:
    """Whether a storage holds neither NaN nor infinity."""
    return all(extreme.isfinite() for extreme in storage.aminmax())  # a NaN is minimum and maximum


def allocate(blocks: Sequence[Block], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A storage for blocks: zeros (elements,)."""
    size = sum(len(block.positions) * sum(map(aligned, block.form.pieces)) for block in blocks)
    return torch.zeros(size, dtype=dtype, device=device)


def entries_of(storage: Tensor, blocks: Sequence[Block]) -> dict[Key, Entry]:
    """All entries of blocks, as views of their storage."""
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
    """The adapter in a filled storage; other arguments as the fields of `Adapter`."""
    kind = "dora" if any(block.form.has_c for block in blocks) else "lora"
    table = table_of(storage, blocks, stack, modules) if storage.is_cuda else None
    rank = largest_rank(block.form for block in blocks)
    return Adapter(stack, tuple(modules), storage, blocks, table, kind, rank, parameters)


def table_of(storage: Tensor, blocks: Sequence[Block], stack: Stack, modules: Sequence[str]) -> Tensor:
    """The entry table of `kernels.entry_table`, on the storage's device."""
    entries = ((block.module, block.positions, block.entries(storage)) for block in blocks)
    return entry_table(entries, len(stack), modules).to(storage.device)


def copied_to(adapter: Adapter, device: torch.device) -> Adapter:
    """A copy of an adapter in another memory. Host memory is pinned if the copy comes from an accelerator.

    The copy may still be running on the current stream when this returns.
    """
    source = adapter.storage
    pinned = device.type == "cpu" and source.is_cuda
    storage = torch.empty(source.shape, dtype=source.dtype, device=device, pin_memory=pinned)
    storage.copy_(source, non_blocking=True)
    table = table_of(storage, adapter.blocks, adapter.stack, adapter.modules) if storage.is_cuda else None
    return replace(adapter, storage=storage, table=table)
