"""Adapters on their way into memory, each loaded by one thread however many calls wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from lorarep_server.metrics import Metrics

T = TypeVar("T")


class Loads:
    """Threads of their own, so that no amount of slow loads keeps requests for what is loaded from being admitted."""

    def __init__(self, metrics: Metrics, threads: int = 8) -> None:
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="lorarep-load")
        self._under_way: dict[Hashable, asyncio.Future[Any]] = {}

    async def run(self, key: Hashable, load: Callable[[], T], source: str = "hub") -> T:
        """What `load` returns or raises; one of the same key that is under way is joined. It goes on if its caller is
        cancelled. `source` is "hub" or "folder", for the metrics."""
        future = self._under_way.get(key)
        if future is None:
            future = asyncio.get_running_loop().run_in_executor(self._threads, self._metrics.timed_load(source, load))
            self._under_way[key] = future
            future.add_done_callback(lambda done: self._forget(key, done))
        return cast(T, await asyncio.shield(future))

    def _forget(self, key: Hashable, done: asyncio.Future[Any]) -> None:
        del self._under_way[key]
        if not done.cancelled():
            done.exception()  # seen, even if every caller has left
