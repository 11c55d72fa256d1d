"""Numbers of the engine: the step loop records them, and any thread reads a snapshot."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorarep_runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class Stats:
    """A snapshot of the requests, pages, steps and tokens of an engine."""

    running: int
    waiting: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    pages_used: int
    pages_total: int
    steps: int
    step_rows: Mapping[int, int]
    """Number of steps by their number of sequences."""
    step_adapters: Mapping[int, int]
    """Number of steps by their number of distinct adapters."""
    preemptions: int
    tokens_in: int
    """Prompt tokens of all requests that have had a token of their answer."""
    tokens_out: int
    """Tokens of all answers."""
    prefix_queries: int
    """Those of `tokens_in` that were looked for in the prefix cache."""
    prefix_hits: int
    """Those of `prefix_queries` that were there, and were not computed."""


class StatsRecorder:
    """The counters behind `Stats`. The step loop's thread writes them; any thread may take a snapshot."""

    def __init__(self, pages_total: int) -> None:
        self._lock = threading.Lock()
        self._pages_total = pages_total
        self._pages_used = 0
        self._running: tuple[tuple[str, ...], ...] = ()
        """Adapter names of each running sequence."""
        self._preemptions = 0
        self._step_rows: Counter[int] = Counter()
        self._step_adapters: Counter[int] = Counter()
        self._tokens_in = self._tokens_out = 0
        self._prefix_queries = self._prefix_hits = 0

    def record_step(self, sequences: Iterable[Sequence]) -> None:
        """Counts a step of these sequences."""
        adapters = [s.lease.adapter for s in sequences]
        with self._lock:
            self._step_rows[len(adapters)] += 1
            self._step_adapters[len({id(adapter) for adapter in adapters if adapter is not None})] += 1

    def record_token(self, sequence: Sequence) -> None:
        """Counts a token that is about to be added to a sequence's answer, and before the first one its prompt."""
        with self._lock:
            if sequence.first_token_at is None:
                self._tokens_in += len(sequence.request.prompt)
                if sequence.keys is not None:
                    self._prefix_queries += len(sequence.request.prompt)
                    self._prefix_hits += sequence.cached_tokens
            self._tokens_out += 1

    def record_preemptions(self, count: int) -> None:
        """Counts sequences that gave their pages back."""
        with self._lock:
            self._preemptions += count

    def record_use(self, running: Iterable[Sequence], pages_used: int) -> None:
        """Replaces the sequences that run now and the number of KV pages in use."""
        names = tuple(sequence.lease.names for sequence in running)
        with self._lock:
            self._running, self._pages_used = names, pages_used

    def snapshot(self, waiting: Mapping[tuple[str, ...], int]) -> Stats:
        """The numbers as they are now.

        Args:
            waiting: number of waiting requests by the adapter names that they asked for.
        """
        with self._lock:
            return Stats(
                running=len(self._running),
                waiting=sum(waiting.values()),
                running_adapters=_distinct(self._running),
                waiting_adapters=_distinct(waiting),
                pages_used=self._pages_used,
                pages_total=self._pages_total,
                steps=self._step_rows.total(),
                step_rows=dict(self._step_rows),
                step_adapters=dict(self._step_adapters),
                preemptions=self._preemptions,
                tokens_in=self._tokens_in,
                tokens_out=self._tokens_out,
                prefix_queries=self._prefix_queries,
                prefix_hits=self._prefix_hits,
            )


def _distinct(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted({name for several in names for name in several}))
