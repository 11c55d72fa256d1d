"""Who has the interpreter when several threads want it (Python's GIL).

Between two steps the step thread has some tenths of a millisecond of Python to do, in pieces: torch lets go of the
interpreter in nearly every call. A load has tens of milliseconds of it. Each time that one has let go, the other has to
be woken to let go as well, and on a busy machine that can take longer than what either is at. So a load waits between
its items while the step thread is at work, and takes the time in which the device is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SWITCH_INTERVAL = 0.0001
"""Seconds for which another thread may keep the step thread from running Python. Python's own 5 ms are a whole step of
a GPU."""
PATIENCE = 0.005
"""Seconds that others wait for the step thread at a time: it may be at something long."""
ITEMS = 16
"""After which others look whether they have to wait: some hundredths of a millisecond."""

_is_free = threading.Event()
_is_free.set()


def switch_often() -> None:
    """Has threads change places after `SWITCH_INTERVAL`, in the whole process."""
    sys.setswitchinterval(SWITCH_INTERVAL)


def claim() -> None:
    """The step thread is at work from now on."""
    _is_free.clear()


def release() -> None:
    """It waits for the device, or has nothing to do."""
    _is_free.set()


def give_way() -> None:
    """Waits while the step thread is at work. For any other thread."""
    _is_free.wait(PATIENCE)


def giving_way(items: Iterable[T]) -> Iterator[T]:
    """The items, and between them the step thread's work."""
    for number, item in enumerate(items):
        if number % ITEMS == 0:
            give_way()
        yield item
