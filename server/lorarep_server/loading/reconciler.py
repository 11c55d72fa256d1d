"""The reconciler keeps the adapters file's adapters loaded: it loads new and changed entries, and unloads removed ones.

It never touches an adapter that was loaded in another way: an entry with the name of such an adapter fails. A branch is
resolved once, when its entry is new or has changed, so the served commit is fixed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorarep_runtime.errors import AlreadyExists, Exhausted, NotFound
from lorarep_server.errors import status_of
from lorarep_server.loading.adapters_file import DesiredAdapter, read_adapters
from lorarep_server.loading.load_queue import LoadQueue, LoadRequest
from lorarep_server.sources import is_folder
from lorarep_server.watched_files import WatchedFiles

if TYPE_CHECKING:
    from lorarep_runtime.adapters.registry import AdapterRegistry
    from lorarep_runtime.adapters.revision import AdapterInfo

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two checks of the file."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds between attempts. Each pause is twice the previous one, and shortened at random, so that many servers do not
ask the Hub at the same time."""
MAX_LOADS = 4
"""Most concurrent loads of the file, which leaves threads of `LoadQueue` for calls."""


@dataclass(eq=False)
class _Entry:
    """The state of a name that is in the file, or was in it and is not unloaded yet."""

    wanted: DesiredAdapter | None
    """The entry in the file; None once it is removed."""
    ours: bool = False
    """Whether the adapter of this name, if there is one, was loaded for this entry."""
    loaded: DesiredAdapter | None = None
    """The entry as it was when its adapter was last loaded."""
    commit: str = ""
    """The commit that was last loaded."""
    error: str = ""
    """The error of the last attempt; empty if it succeeded."""
    attempted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the entry has been loaded or has failed."""
    work: asyncio.Task[None] | None = None
    """The task that loads or unloads the adapter."""

    def load_request(self) -> LoadRequest:
        """The load that brings the adapter into the state of the file."""
        assert self.wanted is not None
        request = replace(self.wanted.load_request, replace=self.loaded is not None)
        if self.loaded is None or is_folder(request.repository):
            return request
        # If only pinning or priority have changed, the branch keeps its commit.
        same_source = replace(self.wanted, pinned=self.loaded.pinned, priority=self.loaded.priority) == self.loaded
        return replace(request, revision=self.commit) if same_source else request

    def set_loaded(self, info: AdapterInfo) -> None:
        """Records that the adapter is in the state of the file."""
        self.loaded, self.commit, self.error = self.wanted, info.commit, ""
        self.attempted.set()


class Reconciler:
    """Keeps the entries of the adapters file loaded. For the event loop's thread, except `states`."""

    def __init__(self, file: Path | None, load_queue: LoadQueue) -> None:
        """Reads the file, if there is one. Raises InvalidArgument if it cannot be used."""
        self._file = None if file is None else WatchedFiles([file], lambda: read_adapters(file))
        self._load_queue = load_queue
        self._slots = asyncio.Semaphore(MAX_LOADS)
        self._entries: dict[str, _Entry] = {}
        self._watching: asyncio.Task[None] | None = None

    def start(self, registry: AdapterRegistry) -> None:
        """Loads the file's adapters, and follows its changes until `stop`."""
        if self._file is not None:
            self._apply(registry, self._file.first)
            self._watching = asyncio.create_task(self._watch(registry, self._file))

    def stop(self) -> None:
        """Cancels all pending loads. Loaded adapters stay."""
        for task in (self._watching, *(entry.work for entry in self._entries.values())):
            if task is not None:
                task.cancel()

    async def attempted(self, seconds: float) -> None:
        """Waits until each entry has been loaded or has failed, but at most so many seconds."""
        attempts = [asyncio.create_task(entry.attempted.wait()) for entry in self._entries.values()]
        if attempts:
            _, late = await asyncio.wait(attempts, timeout=seconds)
            for attempt in late:
                attempt.cancel()

    def get(self, name: str) -> DesiredAdapter | None:
        """The entry of that name; None if there is none, or if another adapter has the name."""
        entry = self._entries.get(name)
        return entry.wanted if entry is not None and entry.ours else None

    def all(self) -> dict[str, DesiredAdapter]:
        """All entries of the file, by name."""
        return {name: entry.wanted for name, entry in self._entries.items() if entry.wanted is not None}

    def load_request(self, name: str) -> LoadRequest:
        """The load that brings an entry's adapter into the state of the file. `get` has to know the name."""
        return self._entries[name].load_request()

    def error(self, name: str) -> str:
        """The error of an entry's last attempt; empty if it succeeded, or if there was none."""
        entry = self._entries.get(name)
        return "" if entry is None else entry.error

    def set_loaded(self, wanted: DesiredAdapter, info: AdapterInfo) -> None:
        """Records that a call has loaded an entry's adapter."""
        if self.get(wanted.name) == wanted:
            self._entries[wanted.name].set_loaded(info)

    def states(self) -> dict[str, int]:
        """The number of entries in each state: "loaded", "loading" and "failed". For any thread."""
        counted = Counter(
            "failed" if entry.error else "loaded" if entry.loaded == entry.wanted else "loading"
            for entry in list(self._entries.values())
            if entry.wanted is not None
        )
        return {state: counted[state] for state in ("loaded", "loading", "failed")}

    async def _watch(self, registry: AdapterRegistry, file: WatchedFiles[dict[str, DesiredAdapter]]) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            wanted = await asyncio.to_thread(file.changed)
            if wanted is not None:
                self._apply(registry, wanted)

    def _apply(self, registry: AdapterRegistry, wanted: Mapping[str, DesiredAdapter]) -> None:
        """Starts the work of each entry that is new, changed or removed."""
        for name in sorted(wanted.keys() | self._entries.keys()):
            entry, now = self._entries.setdefault(name, _Entry(None)), wanted.get(name)
            if entry.work is not None and entry.wanted == now:
                continue
            before, entry.wanted, entry.error = entry.work, now, ""
            if before is not None:
                before.cancel()
            entry.work = asyncio.create_task(self._reconcile(registry, name, entry, before))

    async def _reconcile(
        self, registry: AdapterRegistry, name: str, entry: _Entry, before: asyncio.Task[None] | None
    ) -> None:
        """Brings the adapter of one name into the state of the file.

        Args:
            before: the cancelled task of an older version of the entry.
        """
        if before is not None:
            await asyncio.wait((before,))
            # Its load may have come too far to be cancelled, or calls may wait for it.
            await self._load_queue.settled(name)
        if entry.wanted is None:
            await self._unload(registry, name, entry)
            return
        pause = FIRST_PAUSE
        while True:
            try:
                await self._load(registry, name, entry)
                return
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # libraries in Rust panic with what is no Exception
                wait = self._record_failure(name, entry, error, pause)
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
            if not entry.error:  # a call has loaded the adapter meanwhile
                return

    async def _load(self, registry: AdapterRegistry, name: str, entry: _Entry) -> None:
        if not entry.ours:
            entry.ours = not await asyncio.to_thread(registry.__contains__, name)
        if not entry.ours:
            raise AlreadyExists(f"{name!r} was loaded otherwise than by the adapters file", field="name")
        async with self._slots:
            info = await self._load_queue.load(registry, entry.load_request())
        entry.set_loaded(info)
        log.info("adapters file: %s is %s at %s", name, info.repository, info.commit)

    def _record_failure(self, name: str, entry: _Entry, error: BaseException, pause: float) -> float:
        """Records the error of an attempt. Returns the seconds until the next attempt."""
        status = status_of(error)
        entry.error = f"{status.code.name}: {status.text}"
        if isinstance(error, AlreadyExists) and entry.loaded is None:
            entry.ours = False  # a call was faster
        hint = error.retry_after if isinstance(error, Exhausted) else None
        wait = max(pause * random.uniform(0.5, 1), hint or 0)
        log.warning("adapters file: %s: %s; once more in %.1f s", name, entry.error, wait)
        entry.attempted.set()
        return wait

    async def _unload(self, registry: AdapterRegistry, name: str, entry: _Entry) -> None:
        if entry.ours:
            try:
                await _to_the_end(lambda: _unload_if_loaded(registry, name))
            finally:
                entry.ours, entry.loaded = False, None
            log.info("adapters file: %s has left it and is unloaded", name)
        del self._entries[name]
        entry.attempted.set()


def _unload_if_loaded(registry: AdapterRegistry, name: str) -> None:
    with suppress(NotFound):  # an entry that never loaded
        registry.unload(name)


async def _to_the_end(work: Callable[[], None]) -> None:
    """Runs the work in a thread, and waits for its end even if it is cancelled: others rely on that."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
