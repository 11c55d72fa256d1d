"""The KV cache: one pool of pages for all stacks. A page holds 16 tokens at one position of one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorarep_runtime.config import PAGE_TOKENS
from lorarep_runtime.device.staging import moved
from lorarep_runtime.integers import ceil_div
from lorarep_runtime.model.prefix_cache import Column, PrefixCache

WIPED = 4096
"""Stale pages that are wiped at a time: all would take long between two steps, and a few each time many launches."""
EVICTED = 1 / 16
"""Part of all pages that the prefix cache gives up at a time, if that is less: then so many can be wiped at a time."""


class KVShape(NamedTuple):
    """The keys and values of one token at one position."""

    heads: int
    key_dim: int
    value_dim: int

    def page_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one page, keys and values."""
        return PAGE_TOKENS * self.heads * (self.key_dim + self.value_dim) * dtype.itemsize


class PagePool:
    """Pages and which of them are free. Not thread-safe: the engine's thread alone touches it."""

    def __init__(self, pages: int, kv: KVShape, *, dtype: torch.dtype, device: torch.device) -> None:
        # One more than are given out: the spare page.
        self.key_pages, self.value_pages = (
            torch.zeros((pages + 1, PAGE_TOKENS, kv.heads, dim), dtype=dtype, device=device)
            for dim in (kv.key_dim, kv.value_dim)
        )
        self._wiped = list(range(pages - 1, -1, -1))
        """Free pages that hold zeros."""
        self._stale: list[int] = []
        """Free pages that hold a former sequence's keys and values, which nobody can find."""
        self.prefixes = PrefixCache()
        """The pages that can be found again. Those without users are free, too."""
        self.total = pages
        self.spare_slot = pages * PAGE_TOKENS
        """The slot for keys and values that nobody will read, as page · page_tokens + offset."""

    @property
    def free(self) -> int:
        """Number of pages that no sequence has."""
        return len(self._wiped) + len(self._stale) + self.prefixes.idle_pages

    @property
    def used(self) -> int:
        """Number of pages that sequences have."""
        return self.total - self.free

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Key pages and value pages, (pages, page_tokens, kv_heads, key_dim) and (…, value_dim)."""
        return self.key_pages, self.value_pages

    def grow(self, wanted: Sequence[tuple[PageTable, int]]) -> bool:
        """Makes room for so many tokens in each table; False, with nothing taken, where there are too few pages."""
        missing = [table.missing(tokens) for table, tokens in wanted]
        if sum(missing) > self.free:
            return False
        if any(missing):
            taken = np.split(self.take(sum(missing)), np.cumsum(missing[:-1]))
            for (table, _), pages in zip(wanted, taken, strict=True):
                table.pages = np.concatenate([table.pages, pages.reshape(table.depth, -1)], axis=1)
        return True

    def take(self, count: int) -> NDArray[np.int64]:
        """Takes `count` free pages, of which there must be as many, and returns their numbers."""
        missing = count - len(self._wiped) - len(self._stale)
        if missing > 0:
            self.give(self.prefixes.evict(max(missing, min(WIPED, int(self.total * EVICTED)))))
        if count > len(self._wiped):
            self._wipe(max(count - len(self._wiped), WIPED))
        pages = np.array(self._wiped[len(self._wiped) - count :], dtype=np.int64)
        del self._wiped[len(self._wiped) - count :]
        return pages

    def give(self, pages: NDArray[np.int64]) -> None:
        """Takes pages back, in any shape."""
        self._stale.extend(pages.ravel().tolist())

    def _wipe(self, count: int) -> None:
        wiped = self._stale[-count:]
        self.fill_with_zeros(np.array(wiped))
        self._wiped += wiped
        del self._stale[-count:]

    def fill_with_zeros(self, pages: NDArray[np.int64]) -> None:
        """Fills pages with zeros.

        Slots that no token has been written to are read all the same, under a mask. A mask leaves NaN: in a score, and
        in a value with the weight 0.
        """
        at = moved(torch.from_numpy(pages), self.key_pages.device)
        for tensor in self.tensors:
            tensor.index_fill_(0, at, 0)


class PageTable:
    """The pages of one sequence at every position of its stack."""

    def __init__(self, pool: PagePool, depth: int) -> None:
        self._pool = pool
        self.pages: NDArray[np.int64] = np.empty((depth, 0), dtype=np.int64)
        """(depth, pages per position)."""
        self._published: list[tuple[bytes, Column | None]] = []
        """The first columns, which can be found by their keys; None where another of the same key was there before."""

    @property
    def depth(self) -> int:
        """Positions of the sequence's stack."""
        return len(self.pages)

    @property
    def published(self) -> int:
        """Number of the first columns that can be found. Nobody writes to them."""
        return len(self._published)

    def missing(self, tokens: int) -> int:
        """Pages that are to be added to this table before it holds `tokens` tokens."""
        return self.depth * max(0, pages_of(tokens) - self.pages.shape[1])

    def grow(self, tokens: int) -> bool:
        """Makes room for `tokens` tokens; False, with nothing taken, where the pool has too few pages."""
        return self._pool.grow([(self, tokens)])

    def begin(self, prefix: Sequence[Column], tokens: int) -> bool:
        """Takes the columns of a prefix, and room for `tokens` tokens in all; False, with nothing taken, as `grow`.

        Args:
            prefix: found in the pool's prefix cache just now. The table is empty.
        """
        taken = self.depth * len(prefix)
        idle = sum(len(column.pages) for column in prefix if not column.users)
        if self.missing(tokens) - taken > self._pool.free - idle:
            return False
        if prefix:
            self._pool.prefixes.use(prefix)
            self._published = [(column.key, column) for column in prefix]
            self.pages = np.stack([column.pages for column in prefix], axis=1)
        return self.grow(tokens)

    def publish(self, keys: Sequence[bytes]) -> None:
        """Lets the next columns be found by their keys. Their tokens have been computed, and nobody writes to them."""
        for key in keys:
            self._published.append((key, self._pool.prefixes.add(key, self.pages[:, len(self._published)])))

    def release(self) -> None:
        """Gives all pages back to the pool. Columns that can be found keep what they hold."""
        own = [column is None for _, column in self._published] + [True] * (self.pages.shape[1] - len(self._published))
        self._pool.give(self.pages[:, np.array(own, dtype=bool)])
        self._pool.prefixes.release(self._published)
        self.pages, self._published = self.pages[:, :0], []


def pages_of(tokens: int) -> int:
    """Pages that hold `tokens` tokens at one position."""
    return ceil_div(tokens, PAGE_TOKENS)
