"""The queue of pending loads of adapters. Callers share a load, and it is cancelled when its last caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lorarep_runtime.errors import Cancelled, Exhausted
from lorarep_runtime.failpoints import failpoint
from lorarep_server.sources import is_folder
from lorarep_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from lorarep_runtime.adapters.registry import AdapterRegistry
    from lorarep_runtime.adapters.revision import AdapterInfo
    from lorarep_runtime.progress import Progress
    from lorarep_runtime.text.tokenizer import Tokenizer

T = TypeVar("T")

REPORT_SECONDS = 0.25
"""Seconds between two reports of a load to the same caller."""


@dataclass(frozen=True)
class LoadState:
    """The progress of a load: its stage, and how many of its units are done.

    The stage is "waiting" or a stage of `AdapterRegistry.load`. A total of 0 means that the stage cannot be counted.
    """

    stage: str = "waiting"
    done: int = 0
    total: int = 0


Report = Callable[[LoadState], Awaitable[object]]


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of `AdapterRegistry.load`. Callers that differ in trust, pin and priority alone share a load."""

    name: str
    repository: str
    """A Hub repository id, alone or with a folder there; a trusted request may also have a folder of this machine."""
    revision: str | None = None
    stack: str | None = None
    trusted: bool = False
    pinned: bool | None = None
    priority: int | None = None
    replace: bool = False

    def run(self, registry: AdapterRegistry, progress: Progress | None) -> AdapterInfo:
        """Loads the adapter. Blocks, and raises as `AdapterRegistry.load`."""
        return registry.load(
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
    """Runs loads in threads of its own, so that slow loads do not delay requests for loaded adapters.

    Threads set the state of a load, and callers poll it: no load waits for a slow caller.
    """

    def __init__(self, metrics: Metrics, threads: int = 8, max_waiting: int = 64) -> None:
        """
        Args:
            metrics: counts the duration and the outcome of each load.
            threads: most loads at a time, not counting those that all callers have left.
            max_waiting: most others, which wait or which all callers have left.
        """
        self._metrics = metrics
        self._max_loads = threads + max_waiting
        self._slots = asyncio.Semaphore(threads)
        """One for each load that runs and that somebody waits for."""
        # An abandoned load has given its slot back, but has its thread until the Hub answers or its time is up.
        self._threads = ThreadPoolExecutor(self._max_loads, thread_name_prefix="lorarep-load")
        self._shared: dict[Hashable, _Load[Any]] = {}
        """Loads that new callers can join, by key."""
        self._unfinished: set[_Load[Any]] = set()
        """All loads that have not ended, abandoned ones included."""

    async def load(self, registry: AdapterRegistry, request: LoadRequest, report: Report | None = None) -> AdapterInfo:
        """Loads an adapter under a name, as `run` does. Returns and raises as `AdapterRegistry.load`."""
        registry.check_allowed(request.name, request.repository, request.trusted)  # before it waits for other loads
        source = "folder" if is_folder(request.repository) else "hub"
        key = replace(request, trusted=False, pinned=None, priority=None)
        info = await self.run(key, partial(request.run, registry), report, source, (request.name,))
        # The load may be another caller's, who wanted no pin or another priority.
        wanted, told = (request.pinned, request.priority), (info.pinned, info.priority)
        if all(own is None or own == has for own, has in zip(wanted, told, strict=True)):
            return info
        return await asyncio.to_thread(
            registry.set_policy, request.name, pinned=request.pinned, priority=request.priority
        )

    async def bring(self, registry: AdapterRegistry, name: str, report: Report | None = None) -> None:
        """Makes a known adapter resident, as `run` does, so that a lease of it does not block."""
        await self.run(name, lambda progress: registry.lease([(name, 1.0)], progress=progress).release(), report)

    async def tokenizer(self, registry: AdapterRegistry, adapters: Sequence[tuple[str, float]]) -> Tokenizer:
        """The tokenizer of requests with these adapters, found or downloaded as `run` does, without their weights."""
        names = tuple(name for name, _ in adapters)
        return await self.run(
            ("tokenizer", *names), lambda progress: registry.tokenizer(adapters, progress), names=names
        )

    async def run(
        self,
        key: Hashable,
        load: Callable[[Progress], T],
        report: Report | None = None,
        source: str = "hub",
        names: Collection[str] = (),
    ) -> T:
        """Runs `load` in a thread, or joins the running load of the same key. Returns and raises as `load`.

        When the last of its callers is cancelled, another load takes its turn, and the load ends at its next report
        of progress.

        Args:
            report: told of the state of the load when it has changed, at most every `REPORT_SECONDS`.
            source: "hub" or "folder", for the metrics.
            names: the names of adapters that it may change, for `settled`.

        Raises:
            Exhausted: too many loads are waiting already.
        """
        shared: _Load[T] | None = self._shared.get(key)
        if shared is None:
            shared = self._begin(key, load, source, names)
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
        """Waits until no load of that name is running, abandoned loads included."""
        while results := [shared.result for shared in self._unfinished if name in shared.names]:
            await asyncio.wait(results)

    def _begin(self, key: Hashable, load: Callable[[Progress], T], source: str, names: Collection[str]) -> _Load[T]:
        if len(self._unfinished) >= self._max_loads:
            raise Exhausted(
                f"{self._max_loads} adapters are being loaded already, or wait for that", field="loads", retry_after=1.0
            )
        shared: _Load[T] = _Load(names)
        timed = self._metrics.timed_load(source, partial(load, shared.progress))
        shared.result = asyncio.create_task(shared.work(self._slots, self._threads, timed))
        self._shared[key] = shared
        self._unfinished.add(shared)

        def ended(result: asyncio.Task[T]) -> None:
            self._unfinished.discard(shared)
            self._forget(key, shared)
            if not result.cancelled():
                result.exception()  # marked as retrieved, even if every caller has left

        shared.result.add_done_callback(ended)
        return shared

    def _forget(self, key: Hashable, shared: _Load[T]) -> None:
        if self._shared.get(key) is shared:
            del self._shared[key]


class _Load(Generic[T]):
    """One load, and the number of its callers."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.callers = 0
        self.state = LoadState()
        self.result: asyncio.Task[T]
        self._begun = False
        self._left = asyncio.get_running_loop().create_future()
        self._abandoned = False

    async def work(self, slots: asyncio.Semaphore, threads: Executor, load: Callable[[], T]) -> T:
        """Runs the load in a thread, as soon as there is a slot, which it has until it ends or is abandoned."""
        async with slots:
            self._begun = True
            done = asyncio.get_running_loop().run_in_executor(threads, load)
            await asyncio.wait((done, self._left), return_when=asyncio.FIRST_COMPLETED)
        return await done

    def progress(self, stage: str, done: int, total: int) -> None:
        """Sets the state. Can be called from any thread. Raises Cancelled once the load is abandoned."""
        self.state = LoadState(stage, done, total)
        failpoint(f"load-{stage}")
        if self._abandoned:
            raise Cancelled("nobody waits for it any more", field="load")

    def abandon(self) -> None:
        self._abandoned = True
        if self._begun:
            self._left.set_result(None)
        else:
            self.result.cancel()

    async def follow(self, report: Report) -> None:
        """Reports the state until the load ends."""
        told = None
        while not self.result.done():
            if (state := self.state) != told:
                await report(state)
                told = state
            await asyncio.wait((self.result,), timeout=REPORT_SECONDS)
