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
from lorarep_runtime.model.own_rows import OwnRows
from lorarep_runtime.model.stack import Stack

Key = tuple[int, str]
"""A position in the stack, and the path of a linear module inside its layer, such as "self_attn.q_proj". At `HEAD` and
`EMBEDDING` a path in the model; of rows in place of the base's, that of the file's module that has them."""


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
        a, b, *rest = self.pieces(storage)
        c = rest.pop(0) if self.form.has_c else None
        return Entry(a, b.mT, c, rest.pop(0) if self.form.has_bias else None)

    def pieces(self, storage: Tensor) -> list[Tensor]:
        """For each of `Form.pieces` a view of the storage (entries, *shape)."""
        views, at = [], self.start
        for shape in self.form.pieces:
            size = len(self.positions) * aligned(shape)
            rows = storage[at : at + size].view(len(self.positions), -1)
            views.append(rows[:, : math.prod(shape)].unflatten(1, shape))
            at += size
        return views


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
    def ends(self) -> Mapping[int, Entry | None]:
        """By `HEAD` and `EMBEDDING`, where it has anything for them: its entry, or None beside `own_rows` alone."""
        found: dict[int, Entry | None] = dict.fromkeys(p for b in self.blocks for p in b.positions if p < 0)
        if found:
            ends = [block for block in self.blocks if block.positions[0] < 0]
            found.update((position, entry) for (position, _), entry in entries_of(self.storage, ends).items())
        return found

    def own_rows(self, position: int) -> Sequence[OwnRows]:
        """The rows of the head's or the embedding's weight that it has itself; later ones replace earlier ones."""
        return self._own_rows.get(position, ())

    @cached_property
    def _own_rows(self) -> Mapping[int, Sequence[OwnRows]]:
        found: dict[int, list[OwnRows]] = defaultdict(list)
        own = ((block, block.form.rows) for block in self.blocks if block.form.rows is not None)
        for block, rows in sorted(own, key=lambda one: not isinstance(one[1], range)):  # single ones are the last
            for position, weight in zip(block.positions, block.pieces(self.storage)[0], strict=True):
                found[position].append(OwnRows(rows, weight))
        return found

    @cached_property
    def vocabulary(self) -> int | None:
        """Number of tokens of its vocabulary; None where it has nothing for the head or the embedding."""
        return vocabulary_of({(block.positions[0], block.module): block.form for block in self.blocks})

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
    """The largest rank of an adapter's entries."""
    return max((form.rank for form in forms), default=0)


def vocabulary_of(layout: Layout) -> int | None:
    """Number of tokens of an adapter's vocabulary; None where it has nothing for the head or the embedding."""
    return next((form.tokens for (position, _), form in layout.items() if position < 0), None)


def file_parameters(layout: Layout) -> int:
    """Numbers in the weights file of an adapter."""
    # By form, of which few differ. Head and embedding may have one tensor.
    shared = {module: form for (position, module), form in layout.items() if position < 0 and form.rows}
    forms = Counter(form for form in layout.values() if form.rows is None) + Counter(shared.values())
    return sum(n * sum(math.prod(shape) for _, shape in form.tensors) for form, n in forms.items())


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
    return not len(storage) or all(extreme.isfinite() for extreme in storage.aminmax())  # a NaN is minimum and maximum


def allocate(blocks: Sequence[Block], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A storage for blocks: zeros (elements,)."""
    size = sum(len(block.positions) * sum(map(aligned, block.form.pieces)) for block in blocks)
    return torch.zeros(size, dtype=dtype, device=device)


def entries_of(storage: Tensor, blocks: Sequence[Block]) -> dict[Key, Entry]:
    """All entries of blocks, as views of their storage, without the rows that an adapter has itself."""
    entries: dict[Key, Entry] = {}
    for block in (block for block in blocks if block.form.rows is None):
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
