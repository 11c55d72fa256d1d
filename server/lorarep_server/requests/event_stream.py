"""The way of one request's events from the engine's thread to the coroutine that writes them to its caller."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from lorarep_runtime.errors import Exhausted
from lorarep_runtime.request import Event, Finished, Output


class EventStream:
    """Events of one request, in order. Made by the task that reads it.

    The engine never waits for a reader. What has not been read is kept here; a reader that leaves more than
    `max_unread` events for `patience` seconds, or is at those that it has taken for as long, is too slow: its task is
    cancelled, wherever it waits.
    """

    def __init__(self, max_unread: int, patience: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = asyncio.current_task()
        self._max_unread = max_unread
        self._patience = patience
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.end: Finished | Exception | None = None
        """The last event, once it is there."""
        self.too_slow: Exhausted | None = None
        """Why the reader was cancelled, if that is why."""

    def put(self, event: Event) -> None:
        """Adds an event; from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()
        if not isinstance(event, Output):
            self.end = event
        if len(self._events) > self._max_unread and self._timer is None:
            self._expect(f"more than {self._max_unread} events were")

    def _expect(self, unread: str) -> None:
        self._timer = self._loop.call_later(self._patience, self._give_up, unread)

    def _give_up(self, unread: str) -> None:
        self.too_slow = Exhausted(f"slow reader: {unread} unread for {self._patience:g} seconds")
        if self._reader is not None:
            self._reader.cancel()

    async def take(self) -> tuple[list[Output], Finished | None]:
        """Waits for an event; all outputs that are there, and the end if it is.

        Raises:
            LorarepError: what the request ended with, once its outputs are taken.
        """
        self.close()
        await self._arrived.wait()
        self.close()
        outputs = [event for event in self._events if isinstance(event, Output)]
        if isinstance(self.end, Exception) and not outputs:
            raise self.end
        self._expect("what was sent was")
        if isinstance(self.end, Exception):
            self._events = [self.end]
            return outputs, None
        self._events = []
        self._arrived.clear()
        return outputs, self.end

    def close(self) -> None:
        """Stops the clock on the reader."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
