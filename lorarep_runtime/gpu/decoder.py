"""Decoding on a GPU: a step of one new token for each row, launched as one captured graph.

A step takes the tokens that the one before chose, so it can be launched before anybody has read them. Rows without a
position at a visit of the plan pass through. Where a sequence has grown so long that it is better split into more
parts, the next step is another graph's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorarep_runtime.device.staging import moved, staged
from lorarep_runtime.gpu.buffers import StepMemory
from lorarep_runtime.gpu.fused_layer import FAMILIES, fuse_layers
from lorarep_runtime.gpu.graphs import StepGraph, StepGraphs
from lorarep_runtime.gpu.prefill import Prefill
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PagePool
from lorarep_runtime.model.packed import PACKED_MODULES
from lorarep_runtime.model.plan import Plan, merge

if TYPE_CHECKING:
    from lorarep_runtime.model.base import Base

SILU = {"silu", "swish"}
"""`hidden_act`s that the kernels compute."""
CHANGING_ROTARY = {"dynamic", "longrope"}
"""`rope_type`s whose frequencies depend on the length."""


def can_decode(base: Base) -> bool:
    """Whether there are kernels for a base's layers."""
    config = base.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        base.config.model_type in FAMILIES  # wrappers of theirs may compute more before and after the layers
        and config.hidden_act in SILU
        and rope.get("rope_type", "default") not in CHANGING_ROTARY
        and set(base.modules) == {name for names in PACKED_MODULES for name in names}
    )


class Decoder:
    """The rows of the pending decode step. The engine's thread alone touches it, except for `tensors`."""

    def __init__(self, base: Base, pool: PagePool, max_rows: int, max_tokens: int) -> None:
        """
        Args:
            base: one that `can_decode`.
            max_rows: most rows of a step.
            max_tokens: most tokens of a sequence.
        """
        self.base, self.pool = base, pool
        self.layers = fuse_layers(base)
        self.memory = StepMemory(base, self.layers[0].attention, max_rows, max_tokens, pool.total)
        self.graphs = StepGraphs(base, pool, self.layers)
        self._spans: list[Span] = []
        """One for each row, as `set_rows` was given them."""
        self._known_pages: list[int] = []
        """For each row, how many pages of each position the device knows."""
        self._longest = 0
        """Tokens of the longest sequence in the next step."""
        self._plan: Plan
        self._graph: StepGraph

    def tensors(self) -> list[Tensor]:
        """All memory that is held for steps; any thread may ask."""
        return [*self.memory.tensors, *self.graphs.tensors]

    def set_rows(self, spans: Sequence[Span]) -> None:
        """Sets the rows of the next step: one for each span, which has one token."""
        same = [(span.table, span.context) for span in spans] == [(span.table, span.length) for span in self._spans]
        self._spans, self._longest = list(spans), max(span.length for span in spans)
        tokens = np.array([span.tokens[0] for span in spans])
        if same:
            # Lengths on the device are right: each step adds to them.
            self.set_pages()
            _write(self._graph.buffers.tokens[: len(spans)], tokens)
            return
        self._plan = plan = merge(tuple(sorted({span.stack for span in spans})))
        rank = max((span.adapter.rank for span in spans if span.adapter is not None), default=1)
        buffers = self.memory.views(len(spans), rank, self._longest, plan.depth)
        self._graph = self.graphs.graph(plan, buffers)
        lengths = [span.context for span in spans]
        adapters = [0 if s.adapter is None or s.adapter.table is None else s.adapter.table.data_ptr() for s in spans]
        _write(self._graph.positions, _positions(plan, spans, buffers.shape.rows))
        _write(buffers.tokens, _padded(tokens, np.int64, buffers.shape.rows))
        _write(buffers.lengths, _padded(lengths, np.int32, buffers.shape.rows))
        _write(buffers.adapters, _padded(adapters, np.int64, buffers.shape.rows))
        pages = _pages(spans)
        _write(buffers.tables[: pages.shape[0], : pages.shape[1], : pages.shape[2]], pages)
        self._known_pages = [span.table.pages.shape[1] for span in spans]

    def set_pages(self) -> None:
        """Tells the device of the pages that sequences have got since their rows were set."""
        new = [
            (row, column, span.table.pages[:, column])
            for row, span in enumerate(self._spans)
            for column in range(self._known_pages[row], span.table.pages.shape[1])
        ]
        if not new:
            return
        depth = max(len(pages) for _, _, pages in new)
        entries = np.zeros((len(new), 2 + depth), dtype=np.int64)
        for entry, (row, column, pages) in zip(entries, new, strict=True):
            entry[:2] = row, column
            entry[2 : 2 + len(pages)] = pages  # positions beyond a sequence's depth are never read
        rows, columns, pages = moved(torch.from_numpy(entries), self.base.device).split([1, 1, depth], 1)
        self._graph.buffers.tables[rows[:, 0], :depth, columns[:, 0]] = pages.int()
        self._known_pages = [span.table.pages.shape[1] for span in self._spans]

    def step(self) -> tuple[Tensor, Tensor]:
        """Launches a step for the rows' tokens, after which each sequence is one token longer.

        Returns:
            (rows) int64, the likeliest next tokens, which the next step takes, or the tokens that have been written
            there meanwhile; and logits (rows, vocab) in fp32. Both are overwritten by the next step.
        """
        rows, ranks, splits = self._graph.buffers.shape
        if splits != self.memory.splits(rows, self._longest):
            positions = self._graph.positions
            buffers = self.memory.views(rows, ranks, self._longest, self._plan.depth)
            self._graph = self.graphs.graph(self._plan, buffers)
            self._graph.positions.copy_(positions)
        self._graph.replay()
        self._longest += 1
        buffers, count = self._graph.buffers, len(self._spans)
        return buffers.tokens[:count], buffers.logits[:count]

    def prefill(self, batch: Batch) -> Prefill:
        """A forward pass over prompts, whose slices are launched between steps."""
        return Prefill(self.base, self.pool, self.layers, batch)


def _write(to: Tensor, values: NDArray[Any]) -> None:
    """Overwrites a tensor in its stream's order: a launched step still reads the values before."""
    to.copy_(staged(torch.from_numpy(np.ascontiguousarray(values)), to.device), non_blocking=True)


def _positions(plan: Plan, spans: Sequence[Span], rows: int) -> NDArray[np.int32]:
    """(visits, rows), the position of each row at each visit of a plan; -1 where it has none."""
    index = {stack: i for i, stack in enumerate(plan.stacks)}
    walked = np.array([[-1 if p is None else p for p in visit.positions] for visit in plan.visits], dtype=np.int32)
    positions = np.full((len(plan.visits), rows), -1, dtype=np.int32)
    positions[:, : len(spans)] = walked[:, [index[span.stack] for span in spans]]
    return positions


def _padded(values: Sequence[int] | NDArray[Any], dtype: type[np.integer[Any]], rows: int) -> NDArray[Any]:
    """(rows), the values and then zeros."""
    padded = np.zeros(rows, dtype=dtype)
    padded[: len(values)] = values
    return padded


def _pages(spans: Sequence[Span]) -> NDArray[np.int32]:
    """(rows, positions, pages), the page tables of spans, with zeros beyond a sequence's depth or length."""
    tables = [span.table.pages for span in spans]
    shape = [max(sizes) for sizes in zip(*(pages.shape for pages in tables), strict=True)]
    whole = np.zeros((len(tables), *shape), dtype=np.int32)
    for row, pages in zip(whole, tables, strict=True):
        row[: pages.shape[0], : pages.shape[1]] = pages
    return whole
