"""What rank 0 tells the other ranks about the rows of a pass. Page tables that they know are not sent again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorarep_runtime.model.batch import Span
from lorarep_runtime.model.compiled_adapter import Adapter
from lorarep_runtime.model.kv_cache import PagePool, PageTable
from lorarep_runtime.model.stack import Stack


class SentSpan(NamedTuple):
    """A Span, without what belongs to rank 0 alone."""

    tokens: Sequence[int]
    context: int
    stack: Stack
    adapter: int
    """Its number among the ranks; 0 is none."""
    table: int
    """The number of its page table."""
    pages: NDArray[np.int64]
    """(depth, pages per position) of the sequence, without those that the others know."""


@dataclass
class _Known:
    number: int
    """By which the others know a page table."""
    pages: int
    """Pages of each position that they know."""


class SentTables:
    """Rank 0's page tables, as far as the others know them: those of the last spans that were sent.

    A table only grows: a sequence that gives its pages back has a new one afterwards.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._known: dict[PageTable, _Known] = {}

    def spans(self, spans: Sequence[Span]) -> list[SentSpan]:
        """Spans as they are sent."""
        self._known = {span.table: self._known.get(span.table) or _Known(next(self._numbers), 0) for span in spans}
        return [
            SentSpan(
                list(span.tokens),
                span.context,
                span.stack,
                0 if span.adapter is None else span.adapter.number,
                self._known[span.table].number,
                self._new(span.table),
            )
            for span in spans
        ]

    def new_pages(self, spans: Sequence[Span]) -> list[tuple[int, NDArray[np.int64]]]:
        """Further pages of spans that were sent: the index of each span that has any, and its pages."""
        new = ((i, self._new(span.table)) for i, span in enumerate(spans))
        return [(i, pages) for i, pages in new if pages.shape[1]]

    def _new(self, table: PageTable) -> NDArray[np.int64]:
        """(depth, n), the pages of each position that the others do not know."""
        known = self._known[table]
        new = table.pages[:, known.pages :]
        known.pages += new.shape[1]
        return new


class ReceivedTables:
    """Page tables of another rank, which has the same pages as rank 0."""

    def __init__(self, pool: PagePool, adapters: Mapping[int, Adapter]) -> None:
        """
        Args:
            pool: that rank's pages.
            adapters: that rank's parts, by their numbers.
        """
        self._pool, self._adapters = pool, adapters
        self._tables: dict[int, PageTable] = {}

    def spans(self, sent: Sequence[SentSpan]) -> list[Span]:
        """The spans that `SentTables.spans` has sent."""
        known = self._tables
        self._tables = {one.table: known.get(one.table) or PageTable(self._pool, len(one.stack)) for one in sent}
        spans = []
        for one in sent:
            adapter = self._adapters[one.adapter] if one.adapter else None
            spans.append(Span(one.tokens, one.context, one.stack, adapter, self._tables[one.table]))
            add_pages(spans[-1], one.pages)
        return spans


def add_pages(span: Span, pages: NDArray[np.int64]) -> None:
    """Takes further pages (depth, pages per position) of a span that was received."""
    if pages.shape[1]:
        span.table.pages = np.concatenate([span.table.pages, pages], axis=1)
