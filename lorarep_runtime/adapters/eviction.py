"""The order in which adapters make room for others: pure functions over plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


def in_order(evictables: Iterable[Evictable[T]]) -> list[Evictable[T]]:
    """All of them, the first to go first."""
    return sorted(evictables, key=lambda x: (x.goes_late, x.priority, x.used))


def choose(evictables: Iterable[Evictable[T]], missing: int) -> Sequence[T] | None:
    """The first in order that together give back so many bytes.

    Args:
        missing: bytes that are wanted beyond what is free; zero or less means that none has to go.

    Returns:
        Those to go, in order; None if all together are too small.
    """
    chosen: list[T] = []
    for evictable in in_order(evictables):
        if missing <= 0:
            break
        chosen.append(evictable.item)
        missing -= evictable.size
    return chosen if missing <= 0 else None
