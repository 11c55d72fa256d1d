"""Threads in which requests are made ready for the engine: tokenizers and chat templates may take any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

ADMISSION_THREADS = 8


class AdmissionThreads:
    """Runs the work of calls in threads of its own. Work waits for a free thread in the event loop, not in a queue.

    So work that has not begun goes with its caller. Work that has begun cannot be interrupted: its caller stays a call
    under way until it ends, and the limit of calls bounds what callers that left can have behind them.
    """

    def __init__(self, threads: int = ADMISSION_THREADS) -> None:
        """
        Args:
            threads: most work at a time.
        """
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="lorarep-admit")
        self._free = asyncio.Semaphore(threads)
        self.turns = 0
        """Counts work that has begun or ended: while it stands still, all threads hang or none has work."""

    async def begin(self, work: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Waits for a free thread, and starts the work in it. `ended` gives its result."""
        await self._free.acquire()
        begun = asyncio.get_running_loop().run_in_executor(self._executor, work, *arguments)
        self.turns += 1
        begun.add_done_callback(self._has_ended)
        return begun

    def _has_ended(self, _: asyncio.Future[T]) -> None:
        self.turns += 1
        self._free.release()

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs the work as `begin` and `ended` do, and returns or raises as it does."""
        return await ended(await self.begin(work, *arguments))


async def ended(begun: asyncio.Future[T]) -> T:
    """The result of work that has begun. Waits for its end even if it is cancelled; a second time it gives up."""
    try:
        return await asyncio.shield(begun)
    except asyncio.CancelledError:
        await asyncio.wait((begun,))
        raise


async def run_apart(work: Callable[..., T], *arguments: Any) -> T:
    """Runs work in a thread made for it, for a server's end: all other threads may hang then."""
    with_one = ThreadPoolExecutor(1, thread_name_prefix="lorarep-end")
    try:
        return await asyncio.get_running_loop().run_in_executor(with_one, work, *arguments)
    finally:
        with_one.shutdown(wait=False)


class UnjoinedThreads(ThreadPoolExecutor):
    """Threads for an event loop, which joins its threads at its end. One that hangs must not keep the process alive."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)
