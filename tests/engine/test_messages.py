"""Another rank has rank 0's page tables, and is sent each page once."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np

from lorarep_runtime.engine.messages import ReceivedTables, SentTables, add_pages
from lorarep_runtime.model.batch import Span
from lorarep_runtime.model.kv_cache import PageTable

POOL: Any = SimpleNamespace()
STACK = (0, 1, 1)


def grown(span: Span, columns: int) -> Span:
    """A span whose sequence has got further pages."""
    first = span.table.pages.size
    new = np.arange(first, first + len(STACK) * columns, dtype=np.int64).reshape(len(STACK), columns)
    span.table.pages = np.concatenate([span.table.pages, new], axis=1)
    return span


def span() -> Span:
    return grown(Span([5], 15, STACK, None, PageTable(POOL, len(STACK))), 2)


def test_each_page_is_sent_once_while_its_table_is_among_the_rows() -> None:
    a, b, c = span(), span(), span()
    ours, theirs = SentTables(), ReceivedTables(POOL, {})
    for spans, more, new in (
        ([a, b], 0, [2, 2]),
        ([b, a], 1, [0, 1]),  # in another order, and the last has grown
        ([b, c], 0, [0, 2]),
        ([a, b], 3, [3, 3]),  # the first was not among the last ones
        ([a, b], 0, [0, 0]),
    ):
        grown(spans[-1], more)
        sent = pickle.loads(pickle.dumps(ours.spans(spans)))
        assert [one.pages.shape[1] for one in sent] == new
        received = theirs.spans(sent)
        for own, other in zip(spans, received, strict=True):
            assert np.array_equal(own.table.pages, other.table.pages)
    assert ours.new_pages([a, b]) == []
    for index, pages in ours.new_pages([a, grown(b, 2)]):
        assert index == 1
        add_pages(received[index], pages)
    assert np.array_equal(b.table.pages, received[1].table.pages)
    assert [one.pages.shape[1] for one in ours.spans([a, b])] == [0, 0]
