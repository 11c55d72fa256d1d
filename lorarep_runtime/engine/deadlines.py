"""The deadlines of requests: a look at them costs a step the same, however many requests there are."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from lorarep_runtime.engine.sequence import Sequence

SLACK = 64
"""Entries of ended requests that stay at least until their deadlines."""


class Deadlines:
    """When each request is too late, by `time.monotonic()` seconds."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        """Deadlines and ids. Those of requests that have ended go when they are met, or are many."""

    def add(self, sequence: Sequence) -> None:
        """Watches a sequence's deadline, if it has one."""
        if sequence.request.deadline is not None:
            heapq.heappush(self._heap, (sequence.request.deadline, sequence.id))

    def pop_passed(self, now: float) -> Iterator[int]:
        """The ids of those whose deadline has passed; ended ones may be among them."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[1]

    def forget_ended(self, count: int, is_live: Callable[[int], bool]) -> None:
        """Forgets the ended requests, once they are more than the `count` that live."""
        if len(self._heap) > 2 * count + SLACK:
            self._heap = [entry for entry in self._heap if is_live(entry[1])]
            heapq.heapify(self._heap)
