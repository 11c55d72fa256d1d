"""Tokens that may not come next, since they would end a row of tokens that must not be in an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence


class BadWords:
    """The bad words of one answer, and the end of the answer so far. A step reads it once for each length of word."""

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        """
        Args:
            words: each at least one token.
        """
        self._last: dict[tuple[int, ...], set[int]] = {}
        """The last tokens of words, by all that comes before."""
        for word in words:
            self._last.setdefault(word[:-1], set()).add(word[-1])
        self._lengths = sorted({len(before) for before in self._last})
        self._end: deque[int] = deque(maxlen=max(self._lengths, default=0))

    @property
    def depends_on_answer(self) -> bool:
        """Whether earlier tokens decide which ones may come."""
        return bool(self._end.maxlen)

    def append(self, token: int) -> None:
        """Takes in a token of the answer."""
        self._end.append(token)

    def excluded(self) -> list[int]:
        """The tokens that may not come next."""
        return sorted({*self._found()})

    def _found(self) -> Iterator[int]:
        end = tuple(self._end)
        for length in self._lengths:
            if length <= len(end):
                yield from self._last.get(end[len(end) - length :], ())
