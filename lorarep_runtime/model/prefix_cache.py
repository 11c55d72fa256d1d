"""The prefix cache: which full pages can be found again, by all that their keys and values depend on.

A column is the pages of the same 16 tokens at every position of a stack. Sequences that begin alike share columns. A
column that nobody uses is idle: it can be found as long as nobody wants its pages for something else.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.model.stack import Stack

_TOKENS = struct.Struct(f"<{PAGE_TOKENS}I")


class PrefixKeys:
    """The keys of one sequence's full columns: each is a hash of the key before it and of the column's tokens.

    Args:
        stack: the layers that the sequence walks.
        adapters: tells apart everything that adapters compute; equal for the same contents with the same weights.
        salt: the caller's; sequences of different salts share nothing.
        first_adapted: index of the first token that the adapters compute. Columns before it are the base's own, and
            those from it on are found where it is the same.
    """

    def __init__(
        self, stack: Stack, adapters: tuple[tuple[str, float], ...], salt: str, first_adapted: int = 0
    ) -> None:
        self._last = hashlib.sha256(repr((stack, () if first_adapted else adapters, salt)).encode()).digest()
        self._adapters, self._first_adapted = adapters, first_adapted
        self.known: list[bytes] = []
        """SHA-256 of the first columns."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds the keys of all full columns of a sequence's tokens. Those that are known are not hashed again."""
        for start in range(PAGE_TOKENS * len(self.known), len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
            if 0 < self._first_adapted < start + PAGE_TOKENS <= self._first_adapted + PAGE_TOKENS:
                begin = repr((self._adapters, self._first_adapted)).encode()
                self._last = hashlib.sha256(self._last + begin).digest()
            packed = _TOKENS.pack(*tokens[start : start + PAGE_TOKENS])
            self._last = hashlib.sha256(self._last + packed).digest()
            self.known.append(self._last)


class Column:
    """A column that can be found. Its pages are complete: nobody writes to them."""

    __slots__ = ("key", "pages", "users")

    def __init__(self, key: bytes, pages: NDArray[np.int64]) -> None:
        self.key = key
        self.pages = pages
        """(depth), a page at each position of the stack."""
        self.users = 1
        """Page tables that have it."""


class PrefixCache:
    """The columns that can be found. It knows pages by their numbers alone. The engine's thread alone touches it."""

    def __init__(self) -> None:
        self._columns: dict[bytes, Column] = {}
        self._idle: OrderedDict[bytes, Column] = OrderedDict()
        """Those without users, the least recently used first."""
        self.idle_pages = 0
        """Number of pages of all columns without users."""

    def find(self, keys: Sequence[bytes]) -> list[Column]:
        """The columns of the first keys, as far as all of them are there."""
        found: list[Column] = []
        for key in keys:
            if (column := self._columns.get(key)) is None:
                break
            found.append(column)
        return found

    def add(self, key: bytes, pages: NDArray[np.int64]) -> Column | None:
        """Lets a complete column of its one user be found; None if there is one of its key, which remains.

        Args:
            pages: (depth), its page at each position.
        """
        if key in self._columns:
            return None
        column = self._columns[key] = Column(key, pages.copy())
        return column

    def use(self, columns: Sequence[Column]) -> None:
        """Adds a user to each of some columns."""
        for column in columns:
            if not column.users:
                del self._idle[column.key]
                self.idle_pages -= len(column.pages)
            column.users += 1

    def release(self, columns: Sequence[tuple[bytes, Column | None]]) -> None:
        """Ends a use of each of one sequence's columns. Of those without users, its last ones will be the first to go.

        Args:
            columns: in order, with their keys; None where the sequence had another than the one that can be found.
        """
        for key, column in reversed(columns):
            if column is None:
                if key in self._idle:
                    self._idle.move_to_end(key)
                continue
            column.users -= 1
            if not column.users:
                self._idle[key] = column
                self.idle_pages += len(column.pages)

    def evict(self, pages: int) -> NDArray[np.int64]:
        """Forgets the least recently used idle columns that have at least so many pages, as far as there are any.

        Returns:
            Their pages, which are the caller's now.
        """
        freed: list[NDArray[np.int64]] = []
        count = 0
        while count < pages and self._idle:
            key, column = self._idle.popitem(last=False)
            del self._columns[key]
            freed.append(column.pages)
            count += len(column.pages)
        self.idle_pages -= count
        return np.concatenate([np.empty(0, dtype=np.int64), *freed])
