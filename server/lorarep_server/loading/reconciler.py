"""Keeps the adapters of a file loaded while the server runs: loads what is new or has changed, unloads what has left.

An adapter that was loaded otherwise is never touched: an entry of its name fails for as long as it is there. A branch
is resolved once, when its entry is new or names something else; what serves is a commit.
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
    from lorarep_runtime.adapters.registry import AdapterInfo, AdapterRegistry

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Time between two looks at the file."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds between attempts. Each pause is twice the one before; all are shortened at random, so that many servers do
not ask the Hub at once."""
AT_A_TIME = 4
"""Loads of the file at a time: calls that ask for others find threads of `LoadQueue` free."""


@dataclass(eq=False)
class _Entry:
    """A name that the file has, or has had until its adapter is unloaded."""

    wanted: DesiredAdapter | None
    """None once it has left the file."""
    ours: bool = False
    """Whether what has the name, if anything has, was loaded for this entry."""
    loaded: DesiredAdapter | None = None
    """The entry as it was when its adapter was last loaded..."""
    commit: str = ""
    """...and what that was."""
    error: str = ""
    """Of the last attempt."""
    attempted: asyncio.Event = field(default_factory=asyncio.Event)
    work: asyncio.Task[None] | None = None

    def load(self) -> LoadRequest:
        """What it takes to have what is wanted."""
        assert self.wanted is not None
        whole = replace(self.wanted.load, replace=self.loaded is not None)
        if self.loaded is None or is_folder(whole.repository):
            return whole
        # Pinned or preferred otherwise than before, and that is all: its branch stays where it was.
        like_before = replace(self.wanted, pinned=self.loaded.pinned, priority=self.loaded.priority) == self.loaded
        return replace(whole, revision=self.commit) if like_before else whole

    def has(self, info: AdapterInfo) -> None:
        """Says that what is wanted is loaded."""
        self.loaded, self.commit, self.error = self.wanted, info.commit, ""
        self.attempted.set()


class Reconciler:
    """The entries of the file, or of none. For the event loop's thread, but for `states`."""

    def __init__(self, file: Path | None, loads: LoadQueue) -> None:
        """Raises InvalidArgument if the file cannot be used."""
        self._file = None if file is None else WatchedFiles([file], lambda: read_adapters(file))
        self._loads = loads
        self._places = asyncio.Semaphore(AT_A_TIME)
        self._entries: dict[str, _Entry] = {}
        self._watching: asyncio.Task[None] | None = None

    def start(self, pool: AdapterRegistry) -> None:
        """Has the file followed, until `stop`."""
        if self._file is not None:
            self._apply(pool, self._file.first)
            self._watching = asyncio.create_task(self._watch(pool, self._file))

    def stop(self) -> None:
        """Leaves the loads that are under way, and what is loaded as it is."""
        for task in (self._watching, *(entry.work for entry in self._entries.values())):
            if task is not None:
                task.cancel()

    async def attempted(self, seconds: float) -> None:
        """Once each entry has been loaded or has failed, or after so many seconds."""
        attempts = [asyncio.create_task(entry.attempted.wait()) for entry in self._entries.values()]
        if attempts:
            _, late = await asyncio.wait(attempts, timeout=seconds)
            for attempt in late:
                attempt.cancel()

    def get(self, name: str) -> DesiredAdapter | None:
        """The entry of that name, unless the name is another adapter's."""
        entry = self._entries.get(name)
        return entry.wanted if entry is not None and entry.ours else None

    def all(self) -> dict[str, DesiredAdapter]:
        """By name."""
        return {name: entry.wanted for name, entry in self._entries.items() if entry.wanted is not None}

    def load(self, name: str) -> LoadRequest:
        """What it takes to have what `get` gives."""
        return self._entries[name].load()

    def error(self, name: str) -> str:
        """Why the last attempt failed; empty if it did not, or there was none."""
        entry = self._entries.get(name)
        return "" if entry is None else entry.error

    def has(self, wanted: DesiredAdapter, info: AdapterInfo) -> None:
        """Says that a call has had an entry's adapter loaded."""
        if self.get(wanted.name) == wanted:
            self._entries[wanted.name].has(info)

    def states(self) -> dict[str, int]:
        """How many entries are "loaded" as they are in the file, "loading" or "failed". From any thread."""
        counted = Counter(
            "failed" if entry.error else "loaded" if entry.loaded == entry.wanted else "loading"
            for entry in list(self._entries.values())
            if entry.wanted is not None
        )
        return {state: counted[state] for state in ("loaded", "loading", "failed")}

    async def _watch(self, pool: AdapterRegistry, file: WatchedFiles[dict[str, DesiredAdapter]]) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            wanted = await asyncio.to_thread(file.changed)
            if wanted is not None:
                self._apply(pool, wanted)

    def _apply(self, pool: AdapterRegistry, wanted: Mapping[str, DesiredAdapter]) -> None:
        for name in sorted(wanted.keys() | self._entries.keys()):
            entry, now = self._entries.setdefault(name, _Entry(None)), wanted.get(name)
            if entry.work is not None and entry.wanted == now:
                continue
            before, entry.wanted, entry.error = entry.work, now, ""
            if before is not None:
                before.cancel()
            entry.work = asyncio.create_task(self._work(pool, name, entry, before))

    async def _work(self, pool: AdapterRegistry, name: str, entry: _Entry, before: asyncio.Task[None] | None) -> None:
        """Until what is wanted is so."""
        if before is not None:
            await asyncio.wait((before,))
            # It may have come too far to be cancelled, or calls wait for it.
            await self._loads.settled(name)
        if entry.wanted is None:
            if entry.ours:
                try:
                    await _to_the_end(lambda: _unload(pool, name))
                finally:
                    entry.ours, entry.loaded = False, None
                log.info("adapters file: %s has left it and is unloaded", name)
            del self._entries[name]
            entry.attempted.set()
            return
        pause = FIRST_PAUSE
        while True:
            try:
                if not entry.ours:
                    entry.ours = not await asyncio.to_thread(pool.__contains__, name)
                if not entry.ours:
                    raise AlreadyExists(f"{name!r} was loaded otherwise than by the adapters file", field="name")
                async with self._places:
                    info = await self._loads.load(pool, entry.load())
                entry.has(info)
                log.info("adapters file: %s is %s at %s", name, info.repository, info.commit)
                return
            except Exception as error:
                status = status_of(error)
                entry.error = f"{status.code.name}: {status.text}"
                if isinstance(error, AlreadyExists) and entry.loaded is None:
                    entry.ours = False  # a call was faster
                hint = error.retry_after if isinstance(error, Exhausted) else None
                wait = max(pause * random.uniform(0.5, 1), hint or 0)
                log.warning("adapters file: %s: %s; once more in %.1f s", name, entry.error, wait)
                entry.attempted.set()
            await asyncio.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
            if not entry.error:  # a call has had it loaded meanwhile
                return


def _unload(pool: AdapterRegistry, name: str) -> None:
    with suppress(NotFound):  # was never loaded
        pool.unload(name)


async def _to_the_end(work: Callable[[], None]) -> None:
    """Cancelled, it still waits: nobody may believe that it is over."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
