"""Notices that requests stand still, in the threads of admission or in the step loop, while the event loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorarep_runtime.engine.engine import Engine


class StallWatch:
    """Looks at the engine and at admission. Work that takes long is no stall as long as anything of it goes on."""

    def __init__(
        self,
        engine: Engine,
        pass_admission: Callable[[], Awaitable[None]],
        admission_turns: Callable[[], int],
        seconds: float,
    ) -> None:
        """
        Args:
            engine: counts the turns of its step loop.
            pass_admission: goes the way of a request through the threads of admission, and does nothing there.
            admission_turns: counts what begins and ends in those threads, other requests' work included.
            seconds: between two looks.
        """
        self._engine = engine
        self._pass_admission = pass_admission
        self._admission_turns = admission_turns
        self._seconds = seconds
        self._turns = self._passed = -1
        self._steps = self._admission = 0.0
        """Seconds for which each has stood still."""
        self._passing: asyncio.Future[None] | None = None

    async def wait_and_look(self) -> float:
        """Waits for the time of the next look. Returns the seconds for which requests have stood still.

        Only looks count: time in which the event loop itself was held up is nobody's standstill.
        """
        await asyncio.sleep(self._seconds)
        turns, stats = self._engine.turns, self._engine.stats()
        is_standing = turns == self._turns and bool(stats.running or stats.waiting)
        self._steps = self._steps + self._seconds if is_standing else 0.0
        self._turns = turns
        passed = self._admission_turns()
        is_standing = passed == self._passed and self._passing is not None and not self._passing.done()
        self._admission = self._admission + self._seconds if is_standing else 0.0
        self._passed = passed
        if self._passing is None or self._passing.done():
            self._passing = asyncio.ensure_future(self._pass_admission())
        return max(self._steps, self._admission)

    def close(self) -> None:
        """Leaves admission."""
        if self._passing is not None:
            self._passing.cancel()
