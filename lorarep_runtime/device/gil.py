"""Python's GIL, shared by the step thread and the threads that load adapters.

Between two steps the step thread runs about a millisecond of Python, in pieces: torch releases the GIL in nearly every
call. A load runs tens of milliseconds of it. Each time that one thread has released the GIL, the other has to be woken
to release it as well. On a virtual machine that can take longer than the work of either. So a load goes on piece by
piece, while the device computes a step and will do so for as long as the next piece takes.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SWITCH_INTERVAL = 0.0001
"""Seconds for which another thread may keep the GIL while the step thread wants it. Python's default of 5 ms is as long
as a GPU's whole step."""
PATIENCE = 0.005
"""Seconds that another thread waits for a release at a time: the step thread may have something long to do."""
PIECE = 0.0005
"""Seconds that another thread takes for one piece, and some more, since threads are not woken at once."""
ITEMS = 16
"""Number of a loop's items in one piece."""

_released = threading.Condition()
_until = math.inf
"""`time.perf_counter()` seconds when the step thread will want the GIL again."""


def switch_often() -> None:
    """Sets the whole process's switch interval to SWITCH_INTERVAL."""
    sys.setswitchinterval(SWITCH_INTERVAL)


def claim() -> None:
    """Reserves the GIL for the step thread: streams wait for its work from now on."""
    global _until
    _until = -math.inf


def release(until: float = math.inf) -> None:
    """Leaves the GIL to other threads.

    Args:
        until: `time.perf_counter()` seconds, about, until which the step thread waits for the device; infinity where no
            stream waits for it.
    """
    global _until
    with _released:
        _until = until
        _released.notify_all()


def give_way(seconds: float = PIECE) -> None:
    """Waits for the next release, unless the step thread leaves the GIL to other threads for `seconds` from now."""
    if time.perf_counter() + seconds <= _until:
        return
    with _released:
        if time.perf_counter() + seconds > _until:
            _released.wait(PATIENCE)


def giving_way(items: Iterable[T]) -> Iterator[T]:
    """Iterates in another thread than the step thread, and gives way to that one before every ITEMS items."""
    for number, item in enumerate(items):
        if number % ITEMS == 0:
            give_way()
        yield item
