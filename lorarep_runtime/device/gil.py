"""Who has the interpreter when several threads want it (Python's GIL).

Between two steps the step thread has about a millisecond of Python to do, in pieces: torch lets go of the interpreter
in nearly every call. A load has tens of milliseconds of it. Each time that one has let go, the other has to be woken to
let go as well, which on a virtual machine can take longer than what either is at. So a load goes on piece by piece,
while the device is at a step and will be for as long as the next piece takes.
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
"""Seconds for which another thread may keep the step thread from running Python. Python's own 5 ms are a whole step of
a GPU."""
PATIENCE = 0.005
"""Seconds that others wait for the step thread at a time: it may be at something long."""
PIECE = 0.0005
"""Seconds that others take for what they do at a time, and some more, since threads are not woken at once."""
ITEMS = 16
"""Of a loop at a time."""

_released = threading.Condition()
_until = math.inf
"""When the step thread will be at work again (`time.perf_counter`)."""


def switch_often() -> None:
    """Has threads change places after `SWITCH_INTERVAL`, in the whole process."""
    sys.setswitchinterval(SWITCH_INTERVAL)


def claim() -> None:
    """Streams wait for what the step thread is at from now on."""
    global _until
    _until = -math.inf


def release(until: float = math.inf) -> None:
    """It waits for the device, until about then, or no stream waits for it."""
    global _until
    with _released:
        _until = until
        _released.notify_all()


def give_way(seconds: float = PIECE) -> None:
    """Waits for the next release, unless the step thread is away for so long. For other threads."""
    if time.perf_counter() + seconds <= _until:
        return
    with _released:
        if time.perf_counter() + seconds > _until:
            _released.wait(PATIENCE)


def giving_way(items: Iterable[T]) -> Iterator[T]:
    """The items, and between them the step thread's work."""
    for number, item in enumerate(items):
        if number % ITEMS == 0:
            give_way()
        yield item
