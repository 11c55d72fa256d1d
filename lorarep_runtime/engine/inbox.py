"""All that other threads say to the step loop: submitted and cancelled requests, arrived adapters, the end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from lorarep_runtime.config import SchedulerConfig
from lorarep_runtime.engine.sequence import Sequence
from lorarep_runtime.errors import Exhausted, Unavailable


class Inbox:
    """Thread-safe, under one lock. Its limits hold for all requests that wait, those in the scheduler's queue included.

    A sequence waits from its submission until the scheduler admits it, and again after a preemption. The step loop
    reports both here, so that no other thread has to look into the scheduler.
    """

    def __init__(self, limits: SchedulerConfig) -> None:
        self._limits = limits
        self._news = threading.Condition()
        self._submitted: list[Sequence] = []
        self._cancelled: set[int] = set()
        self._has_arrival = self._is_stopping = False
        self._failure: BaseException | None = None
        self._waiting: dict[int, tuple[str, ...]] = {}
        """Adapter names by the id of each waiting sequence."""
        self._waiting_by_adapter: Counter[tuple[str, ...]] = Counter()

    # Any thread.

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence for the step loop.

        Raises:
            Exhausted: too many requests wait, of all or of this one's adapter.
            Unavailable: the loop stops or has failed.
        """
        with self._news:
            if self._is_stopping or self._failure is not None:
                raise Unavailable("the server is draining" if self._is_stopping else "the engine has failed")
            waiting, own = len(self._waiting), self._waiting_by_adapter[sequence.lease.names]
            if waiting >= self._limits.max_queued:
                raise Exhausted(f"{waiting} requests are waiting already", field="max_queued", retry_after=1.0)
            most = self._limits.max_queued_per_adapter
            if most is not None and own >= most:
                raise Exhausted(
                    f"{own} requests for it are waiting already", field="max_queued_per_adapter", retry_after=1.0
                )
            self._submitted.append(sequence)
            self._add_waiting(sequence)
            self._news.notify()

    def cancel(self, request_id: int) -> None:
        """Asks for the end of a request; one that has ended is left alone."""
        with self._news:
            self._cancelled.add(request_id)
            self._news.notify()

    def announce_adapter(self) -> None:
        """Says that an adapter came to the device, left it, or could not come."""
        with self._news:
            self._has_arrival = True
            self._news.notify()

    def stop(self) -> None:
        """Asks the step loop to stop, and refuses all further requests."""
        with self._news:
            self._is_stopping = True
            self._news.notify()

    def waiting_by_adapter(self) -> Counter[tuple[str, ...]]:
        """Number of waiting requests by the adapter names that they asked for."""
        with self._news:
            return self._waiting_by_adapter.copy()

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the step loop, if one did."""
        return self._failure

    # The step loop's thread.

    def take(self) -> tuple[list[Sequence], set[int]]:
        """The sequences that were submitted and the ids that were cancelled since the last call."""
        with self._news:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, set()
            return submitted, cancelled

    @property
    def has_submitted(self) -> bool:
        """Whether sequences are here that `take` has not given yet."""
        return bool(self._submitted)

    def wait_for_work(self, is_busy: bool) -> bool:
        """Waits for a request or a cancellation, unless the loop has work already; False once it is to stop."""
        with self._news:
            self._news.wait_for(lambda: is_busy or self._is_stopping or self._submitted or self._cancelled)
            return not self._is_stopping

    def wait_for_news(self, seconds: float) -> None:
        """Waits until there is anything to take in, an adapter has arrived or the time is over."""
        with self._news:
            self._news.wait_for(
                lambda: self._is_stopping or self._submitted or self._cancelled or self._has_arrival, seconds
            )
            self._has_arrival = False

    def report_waiting(self, sequences: Iterable[Sequence]) -> None:
        """Counts sequences as waiting again: they were preempted."""
        with self._news:
            for sequence in sequences:
                self._add_waiting(sequence)

    def report_not_waiting(self, sequences: Iterable[Sequence]) -> None:
        """Counts sequences no longer: they were admitted, or have ended, be it after their admission."""
        with self._news:
            for sequence in sequences:
                self._remove_waiting(sequence)

    def report_failure(self, error: BaseException) -> None:
        """Refuses all further requests: the step loop has failed."""
        with self._news:
            self._failure = error

    def _add_waiting(self, sequence: Sequence) -> None:
        self._waiting[sequence.id] = sequence.lease.names
        self._waiting_by_adapter[sequence.lease.names] += 1

    def _remove_waiting(self, sequence: Sequence) -> None:
        names = self._waiting.pop(sequence.id, None)
        if names is not None:
            self._waiting_by_adapter[names] -= 1
            if not self._waiting_by_adapter[names]:
                del self._waiting_by_adapter[names]  # names come and go; their counts must not pile up
