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
    pages: NDArray[np.int64]
    """(depth, pages per position), those that hold context and tokens."""


def sent_spans(spans: Sequence[Span]) -> list[SentSpan]:
    """Spans as they are sent."""
    return [
        SentSpan(
            list(span.tokens),
            span.context,
            span.stack,
            0 if span.adapter is None else span.adapter.number,
            span.table.pages[:, : pages_of(span.length)],
        )
        for span in spans
    ]


def received_spans(sent: Sequence[SentSpan], adapters: Mapping[int, Adapter], pool: PagePool) -> list[Span]:
    """The spans of another rank.

    Args:
        adapters: that rank's parts, by their numbers.
        pool: that rank's pages.
    """
    spans = []
    for one in sent:
        table = PageTable(pool, len(one.stack))
        table.pages = one.pages
        spans.append(Span(one.tokens, one.context, one.stack, adapters[one.adapter] if one.adapter else None, table))
    return spans
