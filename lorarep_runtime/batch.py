"""The tokens of one forward pass, and what each step of the plan needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lorarep_runtime.adapters.weights import Adapter
from lorarep_runtime.cache import PageTable, pages_of
from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.stack import Plan, Stack, merge


@dataclass(frozen=True)
class Span:
    """The next tokens of one sequence."""

    tokens: Sequence[int]
    context: int
    """Tokens of the sequence that are in the cache already."""
    stack: Stack
    adapter: Adapter | None
    table: PageTable
    """Has room for context and tokens."""

    @property
    def length(self) -> int:
        return self.context + len(self.tokens)


class Batch:
    """Spans packed into rows. Rows of one adapter lie side by side."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        adapters = {id(s.adapter): i for i, s in reversed(list(enumerate(spans)))}
        self.order = sorted(range(len(spans)), key=lambda i: adapters[id(spans[i].adapter)])
        """Index among the given spans of each span here."""
        self.spans = [spans[i] for i in self.order]
        self.plan: Plan = merge(tuple(sorted({s.stack for s in spans})))
        self.device = device
        self.starts = np.cumsum([0] + [len(s.tokens) for s in self.spans])
        """First row of each span, and the number of rows."""
        tokens = np.concatenate([np.asarray(s.tokens, dtype=np.int64) for s in self.spans])
        places = np.concatenate([np.arange(s.context, s.length) for s in self.spans])
        self.token_ids = torch.from_numpy(tokens).to(device)
        """(rows) int64."""
        self.token_places = torch.from_numpy(places).to(device)
        """(rows) int64, each token's index in its sequence."""
        self.slots, self.tables = self._addresses()
        self._views: dict[tuple[bool, ...], View] = {}

    def _addresses(self) -> tuple[Tensor, Tensor]:
        """Where each plan step finds keys and values: slots (steps, rows) and page tables (steps, spans, pages)."""
        steps = len(self.plan.steps)
        slots = np.zeros((steps, self.starts[-1]), dtype=np.int64)
        tables = np.zeros((steps, len(self.spans), max(pages_of(s.length) for s in self.spans)), dtype=np.int64)
        walked = [[i for i, s in enumerate(self.plan.steps) if s.positions[k] is not None] for k in self._stack_range]
        for i, (span, stack) in enumerate(zip(self.spans, self._stacks, strict=True)):
            at = walked[stack]
            pages = span.table.pages[:, : pages_of(span.length)]
            tables[at, i, : pages.shape[1]] = pages
            place = np.arange(span.context, span.length)
            slots[at, self.starts[i] : self.starts[i + 1]] = (
                pages[:, place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS
            )
        return torch.from_numpy(slots).to(self.device), torch.from_numpy(tables).to(self.device)

    @property
    def _stack_range(self) -> range:
        return range(len(self.plan.stacks))

    @cached_property
    def _stacks(self) -> list[int]:
        index = {stack: i for i, stack in enumerate(self.plan.stacks)}
        return [index[s.stack] for s in self.spans]

    def view(self, walking: tuple[bool, ...]) -> View:
        """The rows whose stacks have a position at a step.

        Args:
            walking: for each stack of the plan, whether it has one.
        """
        if walking not in self._views:
            chosen = [i for i, stack in enumerate(self._stacks) if walking[stack]]
            self._views[walking] = View(self, chosen, [self._stacks[i] for i in chosen])
        return self._views[walking]


class View:
    """Some of a batch's spans, packed anew."""

    def __init__(self, batch: Batch, chosen: Sequence[int], stacks: Sequence[int]) -> None:
        device = batch.device
        counts = [len(batch.spans[i].tokens) for i in chosen]
        starts = np.cumsum([0, *counts])
        self.rows: Tensor | None = None
        """(rows of the view) int64, their rows in the batch; None where that is all of them."""
        self.spans: Tensor | None = None
        """(spans of the view) int64, likewise."""
        if len(chosen) < len(batch.spans):
            rows = np.concatenate([np.arange(batch.starts[i], batch.starts[i + 1]) for i in chosen])
            self.rows = torch.from_numpy(rows).to(device)
            self.spans = torch.tensor(chosen, device=device)
        self.lengths = torch.tensor([batch.spans[i].length for i in chosen], device=device)
        """(spans of the view) int64, tokens of each sequence, those of this pass included."""
        self.prefills = [
            (k, int(starts[k]), int(starts[k + 1]), pages_of(batch.spans[i].length))
            for k, i in enumerate(chosen)
            if counts[k] > 1
        ]
        """Spans of several tokens: index, first row, end row, pages."""
        decodes = [k for k, count in enumerate(counts) if count == 1]
        self.decode_pages = max((pages_of(batch.spans[chosen[k]].length) for k in decodes), default=0)
        self.decodes = torch.tensor(decodes, device=device)
        """(spans of one token) int64, their indices."""
        self.decode_rows = torch.from_numpy(starts[decodes]).to(device)
        """(spans of one token) int64, their rows."""
        self.lanes: list[tuple[int, int, Adapter, int]] = []
        """First row, end row, adapter, stack: rows that compute with the same adapter."""
        for k, i in enumerate(chosen):
            adapter = batch.spans[i].adapter
            if adapter is None:
                continue
            start, stop = int(starts[k]), int(starts[k + 1])
            if self.lanes and self.lanes[-1][2] is adapter:
                start = self.lanes.pop()[0]
            self.lanes.append((start, stop, adapter, stacks[k]))
