"""The queue of one request's events between the engine's thread and the coroutine that sends them to the caller."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from lorarep_runtime.errors import Exhausted
from lorarep_runtime.request import Event, Finished, Output


class EventStream:
    """The events of one request, in order. The task that reads the stream has to make it.

    The engine never waits for a reader; unread events are kept here. A reader is too slow if it leaves more than
    `max_unread` events for `patience` seconds, or if it needs as long to send the events that it took. The task of a
    reader that is too slow is cancelled, wherever it waits.
    """

    def __init__(self, max_unread: int, patience: float) -> None:
        """
        Args:
            max_unread: events that may stay unread for any time.
            patience: seconds.
        """
        self._loop = asyncio.get_running_loop()
        self._reader = asyncio.current_task()
        self._max_unread = max_unread
        self._patience = patience
        self._events: list[Event] = []
        self._arrived = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.end: Finished | Exception | None = None
        """The last event, once it has arrived."""
        self.too_slow: Exhausted | None = None
        """The error of a reader that was cancelled because it was too slow."""

    def put(self, event: Event) -> None:
        """Adds an event. Can be called from any thread."""
        with suppress(RuntimeError):  # the loop is closed: there is no reader any more
            self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()
        if not isinstance(event, Output):
            self.end = event
        if len(self._events) > self._max_unread and self._timer is None:
            self._start_timer(f"more than {self._max_unread} events were")

    def _start_timer(self, unread: str) -> None:
        self._timer = self._loop.call_later(self._patience, self._give_up, unread)

    def _give_up(self, unread: str) -> None:
        self.too_slow = Exhausted(f"slow reader: {unread} unread for {self._patience:g} seconds")
        if self._reader is not None:
            self._reader.cancel()

    async def take(self) -> tuple[list[Output], Finished | None]:
        """Waits for an event, and takes all that have arrived.

        Returns:
            The outputs, and the end of the request if it has finished.

        Raises:
            LorarepError: the error that ended the request, once its outputs are taken.
        """
        self.close()
        await self._arrived.wait()
        self.close()
        outputs = [event for event in self._events if isinstance(event, Output)]
        if isinstance(self.end, Exception) and not outputs:
            raise self.end
        self._start_timer("what was sent was")
        if isinstance(self.end, Exception):
            self._events = [self.end]
            return outputs, None
        self._events = []
        self._arrived.clear()
        return outputs, self.end

    def close(self) -> None:
        """Stops the timer of the reader."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
