"""The tokens of one forward pass, packed into rows, and the rows that take part in each visit of its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.device.staging import moved
from lorarep_runtime.kernels.eager.adapt import Slice
from lorarep_runtime.kernels.eager.attention import Bounds
from lorarep_runtime.model.compiled_adapter import Adapter
from lorarep_runtime.model.kv_cache import PageTable, pages_of
from lorarep_runtime.model.plan import Plan, Visit, merge
from lorarep_runtime.model.stack import Stack


@dataclass(frozen=True)
class Span:
    """The next tokens of one sequence, and all that computing them needs."""

    tokens: Sequence[int]
    context: int
    """Tokens of the sequence that are in the cache already."""
    stack: Stack
    adapter: Adapter | None
    table: PageTable
    """The sequence's pages, with room for context and tokens."""

    @property
    def length(self) -> int:
        """Tokens of the sequence, these included."""
        return self.context + len(self.tokens)


class Batch:
    """Spans packed into rows, one for each token. Spans of one adapter follow one another.

    Args:
        plan: holds the stacks of the spans; None merges them here.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, plan: Plan | None = None) -> None:
        adapters = {id(s.adapter): i for i, s in reversed(list(enumerate(spans)))}
        self.order = sorted(range(len(spans)), key=lambda i: adapters[id(spans[i].adapter)])
        """For each span of the batch, its index among the spans that were given."""
        self.spans = [spans[i] for i in self.order]
        stacks = {s.stack for s in spans}
        self.plan: Plan = merge(tuple(sorted(stacks))) if plan is None else plan.of(stacks)
        self.device = device
        self.starts = np.cumsum([0] + [len(s.tokens) for s in self.spans])
        """(spans + 1) first row of each span, and then the number of rows."""
        tokens = np.concatenate([np.asarray(s.tokens, dtype=np.int64) for s in self.spans])
        places = np.concatenate([np.arange(s.context, s.length) for s in self.spans])
        self.token_ids = moved(torch.from_numpy(tokens), device)
        """(rows) int64."""
        self.token_places = moved(torch.from_numpy(places), device)
        """(rows) int64, each token's index in its sequence."""
        self.slots, self.tables = self._addresses()
        """(visits, rows) int64, where each row's key and value go, as page · page_tokens + offset; and (visits, spans,
        pages) int64, the pages of each span. Both are 0 at a visit where a span's stack has no position."""
        self.on_leave_out: Callable[[slice, int], None] | None = None
        """Called with what `leave_out` is called with."""
        self._views: dict[tuple[bool, ...], View] = {}

    def _addresses(self) -> tuple[Tensor, Tensor]:
        visits = self.plan.visits
        slots = np.zeros((len(visits), self.starts[-1]), dtype=np.int64)
        tables = np.zeros((len(visits), len(self.spans), max(pages_of(s.length) for s in self.spans)), dtype=np.int64)
        stacks = range(len(self.plan.stacks))
        walked = [[i for i, visit in enumerate(visits) if visit.positions[k] is not None] for k in stacks]
        for i, (span, stack) in enumerate(zip(self.spans, self._stacks, strict=True)):
            at = walked[stack]
            pages = span.table.pages[:, : pages_of(span.length)]
            tables[at, i, : pages.shape[1]] = pages
            tables[at, i, pages.shape[1] :] = pages[:, -1:]  # not another sequence's, which may hold NaN
            place = np.arange(span.context, span.length)
            slots[at, self.starts[i] : self.starts[i + 1]] = (
                pages[:, place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS
            )
        return moved(torch.from_numpy(slots), self.device), moved(torch.from_numpy(tables), self.device)

    @cached_property
    def _stacks(self) -> list[int]:
        """For each span, the index of its stack in the plan."""
        index = {stack: i for i, stack in enumerate(self.plan.stacks)}
        return [index[s.stack] for s in self.spans]

    def leave_out(self, rows: slice, slot: int) -> None:
        """Has rows write their keys and values to a slot that nobody reads, from the next visit on."""
        self.slots[:, rows] = slot
        if self.on_leave_out is not None:
            self.on_leave_out(rows, slot)

    def view(self, walking: tuple[bool, ...]) -> View:
        """The rows whose stacks have a position at a visit.

        Args:
            walking: for each stack of the plan, whether it has a position there.
        """
        if walking not in self._views:
            chosen = [i for i, stack in enumerate(self._stacks) if walking[stack]]
            self._views[walking] = View(self, chosen, [self._stacks[i] for i in chosen])
        return self._views[walking]


@dataclass(frozen=True)
class Prompt:
    """A span of several tokens in a view."""

    span: int
    """Index among the view's spans."""
    start: int
    stop: int
    """Rows of the view, [start, stop)."""
    length: int
    """Tokens of the sequence, those of this pass included."""


@dataclass(frozen=True)
class Keys:
    """The tokens of all sequences of a view, one sequence after the other, those of this pass included."""

    bounds: Bounds
    _spans: Tensor
    """(tokens) int64, index of each token's span."""
    _pages: Tensor
    """(tokens) int64, index of each token's page among those of its span."""
    _places: Tensor
    """(tokens) int64, each token's place in its page."""

    def slots(self, tables: Tensor) -> Tensor:
        """(tokens) int64, page · page_tokens + place of each token at a visit. tables: (spans, n) int64, its pages."""
        return torch.add(self._places, tables[self._spans, self._pages], alpha=PAGE_TOKENS)


class Segment(NamedTuple):
    """Rows of a view that compute with the same adapter."""

    start: int
    stop: int
    """Rows, [start, stop)."""
    adapter: Adapter
    stack: int
    """Index of their stack in the plan."""


class View:
    """The spans of a batch that take part in a visit, packed into rows of their own."""

    def __init__(self, batch: Batch, chosen: Sequence[int], stacks: Sequence[int]) -> None:
        self._device = batch.device
        on_device = self._on_device
        counts = [len(batch.spans[i].tokens) for i in chosen]
        starts = np.cumsum([0, *counts])
        self.rows: Tensor | None = None
        """(rows of the view) int64, their rows in the batch; None where the view has all of them."""
        self.spans: Tensor | None = None
        """(spans of the view) int64, their indices in the batch; None where the view has all of them."""
        if len(chosen) < len(batch.spans):
            self.rows = on_device(np.concatenate([np.arange(batch.starts[i], batch.starts[i + 1]) for i in chosen]))
            self.spans = on_device(chosen)
        self._lengths = [batch.spans[i].length for i in chosen]
        self.lengths = on_device(self._lengths)
        """(spans of the view) int64, tokens of each sequence, those of this pass included."""
        self.prompts: list[Prompt] = []
        """The spans of several tokens."""
        for k, length in enumerate(self._lengths):
            if counts[k] > 1:
                self.prompts.append(Prompt(k, int(starts[k]), int(starts[k + 1]), length))
        self.is_whole = self._lengths == counts
        """Whether the view has all tokens of its sequences, so that none reads another's keys out of pages."""
        self.row_bounds = Bounds(on_device(starts, torch.int32), max(counts, default=0))
        """Where each span's rows begin."""
        decodes = [k for k, count in enumerate(counts) if count == 1]
        self.decode_pages = max((pages_of(batch.spans[chosen[k]].length) for k in decodes), default=0)
        """Most pages of a span of one token."""
        self.decodes = on_device(decodes)
        """(spans of one token) int64, their indices in the view."""
        self.decode_rows = on_device(starts[decodes])
        """(spans of one token) int64, their rows in the view."""
        self.segments = _segments([batch.spans[i].adapter for i in chosen], starts.tolist(), stacks)
        """The rows that have adapters."""

    def _on_device(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return moved(torch.as_tensor(values, dtype=dtype), self._device)

    @cached_property
    def rows_alone(self) -> Sequence[tuple[int, int]]:
        """For each row the index of its span in the view, and the tokens of the sequence up to the row's own."""
        starts = self.row_bounds.starts.tolist()
        return [
            (k, length - stop + row + 1)
            for k, (length, (start, stop)) in enumerate(zip(self._lengths, pairwise(starts), strict=True))
            for row in range(start, stop)
        ]

    @cached_property
    def keys(self) -> Keys:
        """The tokens that rows of the view may attend to."""
        places = np.concatenate([np.arange(length) for length in self._lengths])
        return Keys(
            Bounds(self._on_device(np.cumsum([0, *self._lengths]), torch.int32), max(self._lengths)),
            self._on_device(np.repeat(np.arange(len(self._lengths)), self._lengths)),
            self._on_device(places // PAGE_TOKENS),
            self._on_device(places % PAGE_TOKENS),
        )

    def slices(self, visit: Visit, module: str) -> list[Slice]:
        """The adapters' entries for a linear module at a visit, with the rows that each applies to."""
        return [
            Slice(start, stop, entry.A, entry.B, entry.c, entry.bias)
            for start, stop, adapter, stack in self.segments
            if (position := visit.positions[stack]) is not None
            if (entry := adapter.entries.get((position, module))) is not None
        ]


def _segments(adapters: Sequence[Adapter | None], starts: Sequence[int], stacks: Sequence[int]) -> list[Segment]:
    """Rows of spans by adapter: spans of one adapter that follow one another are one segment.

    Args:
        starts: first row of each span, and then the number of rows.
        stacks: for each span, the index of its stack in the plan.
    """
    segments: list[Segment] = []
    for (start, stop), adapter, stack in zip(pairwise(starts), adapters, stacks, strict=True):
        if adapter is None:
            continue
        if segments and segments[-1].adapter is adapter:
            start = segments.pop().start
        segments.append(Segment(start, stop, adapter, stack))
    return segments
