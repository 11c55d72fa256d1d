"""What rank 0 tells the other ranks about a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorarep_runtime.model.batch import Span
from lorarep_runtime.model.compiled_adapter import Adapter
from lorarep_runtime.model.kv_cache import PagePool, PageTable, pages_of
from lorarep_runtime.model.stack import Stack


class SentSpan(NamedTuple):
    """A Span, without what belongs to rank 0 alone."""

    tokens: Sequence[int]
    context: int
    stack: Stack
    adapter: int
    """Its number among the ranks; 0 is none."""
    table: int
    """A number of its page table; 0 is a new one, which no later span has."""
    pages: NDArray[np.int64]
    """(depth, pages per position) of the sequence."""


def sent_spans(spans: Sequence[Span], tables: Mapping[PageTable, int] | None = None) -> list[SentSpan]:
    """Spans as they are sent.

    Args:
        tables: numbers of their page tables.
    """
    return [
        SentSpan(
            list(span.tokens),
            span.context,
            span.stack,
            0 if span.adapter is None else span.adapter.number,
            0 if tables is None else tables[span.table],
            span.table.pages if tables is not None else span.table.pages[:, : pages_of(span.length)],
        )
        for span in spans
    ]


def received_spans(
    sent: Sequence[SentSpan],
    adapters: Mapping[int, Adapter],
    pool: PagePool,
    tables: Mapping[int, PageTable] | None = None,
) -> list[Span]:
    """The spans of another rank.

    Args:
        adapters: that rank's parts, by their numbers.
        pool: that rank's pages.
        tables: that rank's page tables that are known by a number.
    """
    spans = []
    for one in sent:
        table = (tables or {}).get(one.table) or PageTable(pool, len(one.stack))
        table.pages = one.pages
        spans.append(Span(one.tokens, one.context, one.stack, adapters[one.adapter] if one.adapter else None, table))
    return spans
