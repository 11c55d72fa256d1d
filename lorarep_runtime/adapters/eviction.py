"""The order in which adapters make room for others: pure functions over plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Evictable(Generic[T]):
    """Something that may give its bytes in one memory to others."""

    item: T
    size: int
    """Bytes that it gives back."""
    goes_late: bool
    """Whether it goes only after all others: on the device since waiting requests hold it; in host memory since its
    copy is all that memory holds of it."""
    priority: int
    """The lowest goes first."""
    used: int
    """Tick of its last use; of one priority the least recently used goes first."""


def first(evictables: Iterable[Evictable[T]]) -> T | None:
    """The first to go; None if there is none."""
    found = min(evictables, key=_turn, default=None)
    return None if found is None else found.item


def choose(evictables: Iterable[Evictable[T]], missing: int) -> Sequence[T] | None:
    """The first in order that together give back so many bytes.

    Args:
        missing: bytes that are wanted beyond what is free; zero or less means that none has to go.

    Returns:
        Those to go, in order; None if all together are too small.
    """
    # A heap: few go, of thousands, and steps wait for the lock that is held.
    heap = [(_turn(evictable), i, evictable) for i, evictable in enumerate(evictables)]
    heapify(heap)
    chosen: list[T] = []
    while heap and missing > 0:
        *_, evictable = heappop(heap)
        chosen.append(evictable.item)
        missing -= evictable.size
    return chosen if missing <= 0 else None


def _turn(evictable: Evictable[T]) -> tuple[bool, int, int]:
    return evictable.goes_late, evictable.priority, evictable.used
