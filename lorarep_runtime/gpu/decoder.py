"""Decoding on a GPU: a step of one new token for each row, launched as one captured graph.

The tokens of a short prompt are rows, too: each attends to those before it. A step takes the tokens that the one before
chose, so it can be launched before anybody has read them. Rows without a position at a visit of the plan pass through.
Where a sequence has grown so long that it is better split into more parts, the next step is another graph's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from lorarep_runtime.gpu.rank_sums import RankSums
from lorarep_runtime.gpu.step_ends import StepEnds
from lorarep_runtime.kernels.gemms import too_old
from lorarep_runtime.model.batch import Batch, Span
from lorarep_runtime.model.kv_cache import PagePool, PageTable
from lorarep_runtime.model.packed import PACKED_MODULES
from lorarep_runtime.model.plan import Plan

if TYPE_CHECKING:
    from lorarep_runtime.model.base import Base

ROWS_WITH_PROMPTS = {16: 64, 64: 128}
"""By the most rows that decode: most rows of a step that takes about twice as long as theirs alone, on an H200."""
SILU = {"silu", "swish"}
"""`hidden_act`s that the kernels compute."""
CHANGING_ROTARY = {"dynamic", "longrope"}
"""`rope_type`s whose frequencies depend on the length."""


def can_decode(base: Base) -> bool:
    """Whether there are kernels for a base's layers."""
    return decode_obstacle(base) is None


def decode_obstacle(base: Base) -> str | None:
    """Why there are no kernels for a base's layers on its device; None where there are."""
    if base.device.type == "cuda" and (reason := too_old(base.device)) is not None:
        return reason
    family, config = base.config.model_type, base.config.get_text_config()
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if family not in FAMILIES:  # wrappers of theirs may compute more before and after the layers
        return f"{family} is none of {', '.join(sorted(FAMILIES))}"
    if config.hidden_act not in SILU:
        return f"its activation is {config.hidden_act}, and not SiLU"
    if rope in CHANGING_ROTARY:
        return f"its rotary embedding is {rope}, and changes with the length"
    if set(base.modules) != {name for names in PACKED_MODULES for name in names}:
        return "its layers have other linear modules than Llama's"
    return None


@dataclass
class _Known:
    """What the device knows of a sequence's pages."""

    number: int
    """The sequence's number in the page tables."""
    pages: int
    """Pages of each position."""


class Decoder:
    """The rows of the pending decode step. The engine's thread alone touches it, except for `tensors`."""

    def __init__(
        self,
        base: Base,
        pool: PagePool,
        max_sequences: int,
        max_tokens: int,
        max_pages: int,
        deterministic: bool = False,
    ) -> None:
        """
        Args:
            base: one that `can_decode`.
            max_sequences: most sequences of a step.
            max_tokens: most tokens of a sequence.
            max_pages: most pages of a sequence at each of its positions, whatever its stack.
            deterministic: the logits of a row are bitwise the same whatever other rows there are, and whether its token
                is one of a prompt or decodes. Only steps are, not prefill passes; and linear modules that are packed.
        """
        self.base, self.pool = base, pool
        self._sums = sums = None if base.shard is None else RankSums(base.shard.group, base.device)
        self.layers = fuse_layers(base, sums, deterministic=deterministic)
        attention = self.layers[0].attention
        self.memory = StepMemory(base, attention, max_sequences, max_tokens, max_pages, deterministic=deterministic)
        if sums is not None and base.divided_ends is not None:
            sums.take_memory(self.memory.h, self.memory.max_sequences * base.divided_ends.width)
        self.graphs = StepGraphs(base, pool, self.layers, StepEnds(base, sums))
        self._spans: list[Span] = []
        """As `set_rows` was given them."""
        self._rows = 0
        """Rows of the next step: one for each token of the spans."""
        self._tables: Tensor | None = None
        """The page tables of the rows' graph."""
        self._known: dict[PageTable, _Known] = {}
        """What the device knows there of each span's pages."""
        self._longest = 0
        """Tokens of the longest sequence in the next step."""
        self._plan: Plan
        self._graph: StepGraph

    def tensors(self) -> list[Tensor]:
        """All memory that is held for steps; any thread may ask."""
        shared = [] if self._sums is None else self._sums.tensors
        return [*self.memory.tensors, *self.graphs.tensors, *shared]

    def rows_with_prompts(self, decoding: int) -> int:
        """Most rows of a step in which so many decode, if it may take about twice as long for the prompts' sake."""
        most = self.memory.max_rows
        return next((rows for least, rows in ROWS_WITH_PROMPTS.items() if 0 < decoding <= least), most)

    def set_rows(self, spans: Sequence[Span], plan: Plan) -> None:
        """Sets the rows of the next step, one for each token of each span.

        If a span has several tokens, rows have to be set before each following step.

        Args:
            plan: holds the stacks of the spans.
        """
        same = self._rows == len(self._spans) and all(len(span.tokens) == 1 for span in spans)
        same &= [(span.table, span.context) for span in spans] == [(span.table, span.length) for span in self._spans]
        self._spans, self._longest = list(spans), max(span.length for span in spans)
        tokens = np.array([token for span in spans for token in span.tokens])
        self._rows = len(tokens)
        if same:
            # Lengths on the device are right: each step adds to them.
            self.set_pages()
            _write(self._graph.buffers.tokens[: len(spans)], tokens)
            return
        self._plan = plan
        rank = max((span.adapter.rank for span in spans if span.adapter is not None), default=1)
        shares = len(tokens) > len(spans)
        buffers = self.memory.views(len(tokens), rank, self._longest, plan.depth, shares_sequences=shares)
        self._graph = self.graphs.graph(plan, buffers)
        counts = [len(span.tokens) for span in spans]
        owners = np.repeat(np.arange(len(spans)), counts)
        lengths = np.concatenate([np.arange(span.context, span.length) for span in spans])
        tables = [0 if s.adapter is None or s.adapter.table is None else s.adapter.table.data_ptr() for s in spans]
        _write(self._graph.positions, _positions(plan, spans, owners, buffers.shape.rows))
        _write(buffers.tokens, _padded(tokens, np.int64, buffers.shape.rows))
        _write(buffers.lengths, _padded(lengths, np.int32, buffers.shape.rows))
        _write(buffers.adapters, _padded(np.array(tables)[owners], np.int64, buffers.shape.rows))
        self._place(buffers.tables)
        if shares:
            _write(buffers.ends, _padded(np.cumsum(counts) - 1, np.int64, len(buffers.ends)))
        numbers = np.array([self._known[span.table].number for span in spans])
        _write(buffers.sequences, _padded(numbers[owners], np.int32, buffers.shape.rows))

    def keep_rows(self, kept: Sequence[int]) -> None:
        """Leaves all other rows of the last step out of the next ones, where each span was one token.

        Args:
            kept: rows of the last step, in order. Each has its next token there.
        """
        spans = [self._spans[row] for row in kept]
        self._longest -= max(span.length for span in self._spans) - max(span.length for span in spans)
        self._spans, self._rows = spans, len(kept)
        old, depth = self._graph, self._plan.depth
        buffers = self.memory.views(len(kept), old.buffers.shape.ranks, self._longest, depth)
        self._graph = self.graphs.graph(self._plan, buffers)
        rows = moved(torch.tensor(kept), self.base.device)
        positions = old.positions[:, rows]
        self._graph.positions.fill_(-1)
        self._graph.positions[:, : len(kept)] = positions
        for name in ("tokens", "lengths", "adapters", "sequences"):
            getattr(buffers, name)[: len(kept)] = getattr(old.buffers, name)[rows]

    def _place(self, tables: Tensor) -> None:
        """Has the page tables of a graph hold all spans' pages. Sequences that are known there stay in their place."""
        if tables is not self._tables:
            self._tables, self._known = tables, {}
        known = {span.table: self._known[span.table] for span in self._spans if span.table in self._known}
        taken = {at.number for at in known.values()}
        free = (number for number in range(len(tables)) if number not in taken)
        new = [span.table for span in self._spans if span.table not in known]
        self._known = known | {table: _Known(next(free), table.pages.shape[1]) for table in new}
        self.set_pages()
        if new:
            numbers = moved(torch.tensor([self._known[table].number for table in new]), self.base.device)
            pages = moved(torch.from_numpy(_pages(new)), self.base.device)
            tables[numbers, : pages.shape[1], : pages.shape[2]] = pages

    def set_pages(self) -> None:
        """Tells the device of the pages that sequences have got since their rows were set."""
        new = []
        for span in self._spans:
            at, pages = self._known[span.table], span.table.pages
            new += [(at.number, column, pages[:, column]) for column in range(at.pages, pages.shape[1])]
            at.pages = pages.shape[1]
        if not new:
            return
        depth = max(len(pages) for _, _, pages in new)
        entries = np.zeros((len(new), 2 + depth), dtype=np.int64)
        for entry, (number, column, pages) in zip(entries, new, strict=True):
            entry[:2] = number, column
            entry[2 : 2 + len(pages)] = pages  # positions beyond a sequence's depth are never read
        numbers, columns, pages = moved(torch.from_numpy(entries), self.base.device).split([1, 1, depth], 1)
        self._graph.buffers.tables[numbers[:, 0], :depth, columns[:, 0]] = pages.int()

    def step(self) -> tuple[Tensor, Tensor]:
        """Launches a step for the rows' tokens, after which each row's length is one more.

        Returns:
            (spans) int64, the likeliest next token of each, which the next step takes, or the tokens that have been
            written there meanwhile; and logits (spans, vocab) in fp32. Both are overwritten by the next step.
        """
        rows, ranks, splits, shares = self._graph.buffers.shape
        if splits != self.memory.splits(rows, self._longest):
            positions = self._graph.positions
            buffers = self.memory.views(rows, ranks, self._longest, self._plan.depth, shares_sequences=shares)
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


def _positions(plan: Plan, spans: Sequence[Span], owners: NDArray[np.int64], rows: int) -> NDArray[np.int32]:
    """(visits, rows), the position of each row at each visit of a plan; -1 where it has none.

    Args:
        owners: index of each row's span.
    """
    index = {stack: i for i, stack in enumerate(plan.stacks)}
    walked = np.array([[-1 if p is None else p for p in visit.positions] for visit in plan.visits], dtype=np.int32)
    positions = np.full((len(plan.visits), rows), -1, dtype=np.int32)
    positions[:, : len(owners)] = walked[:, np.array([index[span.stack] for span in spans])[owners]]
    return positions


def _padded(values: Sequence[int] | NDArray[Any], dtype: type[np.integer[Any]], rows: int) -> NDArray[Any]:
    """(rows), the values and then zeros."""
    padded = np.zeros(rows, dtype=dtype)
    padded[: len(values)] = values
    return padded


def _pages(tables: Sequence[PageTable]) -> NDArray[np.int32]:
    """(tables, positions, pages), the pages of tables, with zeros beyond a sequence's depth or length."""
    shape = [max(sizes) for sizes in zip(*(table.pages.shape for table in tables), strict=True)]
    whole = np.zeros((len(tables), *shape), dtype=np.int32)
    for to, table in zip(whole, tables, strict=True):
        to[: table.pages.shape[0], : table.pages.shape[1]] = table.pages
    return whole
