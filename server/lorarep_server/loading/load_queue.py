"""Adapters on their way into memory: each loaded once, however many calls wait for it, and only while one does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lorarep_runtime.errors import Cancelled, Exhausted
from lorarep_runtime.failpoints import failpoint
from lorarep_server.sources import is_folder
from lorarep_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from lorarep_runtime.adapters.registry import AdapterInfo, AdapterRegistry
    from lorarep_runtime.progress import Progress

T = TypeVar("T")

REPORT_SECONDS = 0.25
"""Time between two reports of a load to the same caller."""


@dataclass(frozen=True)
class State:
    """Where a load is: "waiting", or a stage of `AdapterRegistry.load` with how much is done and how much there is."""

    stage: str = "waiting"
    done: int = 0
    total: int = 0


Report = Callable[[State], Awaitable[object]]


@dataclass(frozen=True)
class LoadRequest:
    """What `AdapterRegistry.load` is asked for; equal ones are one load."""

    name: str
    repository: str
    """Or, if trusted, a folder."""
    revision: str | None = None
    stack: str | None = None
    trusted: bool = False
    pinned: bool = False
    priority: int = 0
    replace: bool = False

    def run(self, pool: AdapterRegistry, progress: Progress | None) -> AdapterInfo:
        """Raises as `AdapterRegistry.load`."""
        return pool.load(
            self.name,
            self.repository,
            self.revision,
            stack=self.stack,
            trusted=self.trusted,
            pinned=self.pinned,
            priority=self.priority,
            replace=self.replace,
            progress=progress,
        )


class LoadQueue:
    """Threads of their own, so that no amount of slow loads keeps requests for what is loaded from being admitted.

    Threads write where a load is, and callers look now and then: however slowly they read, no load waits for them.
    """

    def __init__(self, metrics: Metrics, threads: int = 8, max_waiting: int = 64) -> None:
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="lorarep-load")
        self._most = threads + max_waiting
        self._shared: dict[Hashable, _Load[Any]] = {}
        """Those that can be joined."""
        self._unfinished: set[_Load[Any]] = set()
        """And those that everybody has left, which have not noticed yet."""

    async def load(self, pool: AdapterRegistry, wanted: LoadRequest, report: Report | None = None) -> AdapterInfo:
        """What `AdapterRegistry.load` returns or raises; see `run`."""
        pool.check_allowed(wanted.name, wanted.repository, wanted.trusted)  # before it waits for others
        source = "folder" if is_folder(wanted.repository) else "hub"
        return await self.run(wanted, partial(wanted.run, pool), report, source)

    async def bring(self, pool: AdapterRegistry, name: str, report: Report | None = None) -> None:
        """Has an adapter found by its name or repository, so that a lease has nothing to wait for; see `run`."""
        await self.run(name, lambda progress: pool.lease([(name, 1.0)], progress=progress).release(), report)

    async def run(
        self, key: Hashable, load: Callable[[Progress], T], report: Report | None = None, source: str = "hub"
    ) -> T:
        """What `load` returns or raises; one of the same key that is under way is joined.

        When the last of its callers is cancelled, the load ends with what it next says of its progress.

        Args:
            report: told where the load is, whenever that has changed, at most every `REPORT_SECONDS`.
            source: "hub" or "folder", for the metrics.

        Raises:
            Exhausted: too many loads wait already.
        """
        shared: _Load[T] | None = self._shared.get(key)
        if shared is None:
            shared = self._begin(key, load, source)
        shared.callers += 1
        try:
            if report is not None:
                await shared.follow(report)
            await asyncio.wait((shared.result,))
            return shared.result.result()
        finally:
            shared.callers -= 1
            if not shared.callers and not shared.result.done():
                shared.abandon()
                self._forget(key, shared)

    async def settled(self, name: str) -> None:
        """Once no load of that name is under way, those that everybody has left included."""
        while results := [shared.result for shared in self._unfinished if shared.name == name]:
            await asyncio.wait(results)

    def _begin(self, key: Hashable, load: Callable[[Progress], T], source: str) -> _Load[T]:
        if len(self._unfinished) >= self._most:
            raise Exhausted(
                f"{self._most} adapters are being loaded already, or wait for that", field="loads", retry_after=1.0
            )
        shared: _Load[T] = _Load(key.name if isinstance(key, LoadRequest) else "")
        timed = self._metrics.timed_load(source, partial(load, shared.progress))
        shared.begin(self._threads.submit(timed))
        self._shared[key] = shared
        self._unfinished.add(shared)

        def ended(result: asyncio.Future[T]) -> None:
            self._unfinished.discard(shared)
            self._forget(key, shared)
            if not result.cancelled():
                result.exception()  # seen, even if every caller has left

        shared.result.add_done_callback(ended)
        return shared

    def _forget(self, key: Hashable, shared: _Load[T]) -> None:
        if self._shared.get(key) is shared:
            del self._shared[key]


class _Load(Generic[T]):
    """One load, and those who wait for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.callers = 0
        self.state = State()
        self.result: asyncio.Future[T]
        self._work: Future[T]
        self._abandoned = False

    def begin(self, work: Future[T]) -> None:
        self._work = work
        self.result = asyncio.wrap_future(work)

    def progress(self, stage: str, done: int, total: int) -> None:
        """From any thread. Raises Cancelled once nobody waits any more."""
        self.state = State(stage, done, total)
        failpoint(f"load-{stage}")
        if self._abandoned:
            raise Cancelled("nobody waits for it any more", field="load")

    def abandon(self) -> None:
        self._abandoned = True
        self._work.cancel()  # if no thread has begun it

    async def follow(self, report: Report) -> None:
        """Until it ends."""
        told = None
        while not self.result.done():
            if (state := self.state) != told:
                await report(state)
                told = state
            await asyncio.wait((self.result,), timeout=REPORT_SECONDS)
