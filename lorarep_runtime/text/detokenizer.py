"""The text of an answer as its tokens come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lorarep_runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders give for bytes that are no character (yet)."""


CHARACTER_TOKENS = 4
"""Most tokens of one character: UTF-8 has up to four bytes."""


CONTEXT_TOKENS = 6
"""Earlier tokens that new ones are decoded with, at least, as decoders treat the first of a text differently: some drop
its space."""


class TextStream:
    """The text of an answer as its tokens come. What it gives out is final: whole characters, no part of a stop."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens = self._context(prompt)
        """The context of the next tokens, and those that are part of a character yet."""
        self._known = tokenizer.decode(self._tokens)
        """Their text, as far as it has been taken in."""
        self._groups = deque([len(self._tokens)])
        """How many of the tokens, from the first on, make whole characters together. A context that began inside one
        could be replacements from end to end: of a run of bytes that is no text in UTF-8 some decoders replace all."""
        self._fresh = 0
        """How many tokens have come since one ended a character."""
        self._held = ""
        """Text that may be the beginning of a stop."""

    def feed(self, token: int, *, may_stop: bool = True) -> tuple[str, str]:
        """Adds a token.

        Args:
            may_stop: whether a stop that the token completes ends the answer; if not, it is text like any other.

        Returns:
            Text that can be shown, and the stop that was met, if one was. After that nothing may be fed.
        """
        text = self._held + self._decode(token)
        if may_stop and (met := [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]):
            at, stop = min(met)
            return text[:at], stop
        kept = self._beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], ""

    def finish(self) -> str:
        """The rest of an answer that no stop ended. A character that it breaks off in is left out."""
        return self._held

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, from the beginning of a character on; none if it ends inside one."""
        tokens, text = [], ""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + CHARACTER_TOKENS):
            tokens = list(prompt[-count:])
            text = self._tokenizer.decode(tokens)
            if not text.startswith(REPLACEMENT) and not text.endswith(REPLACEMENT):
                break
        return [] if text.endswith(REPLACEMENT) else tokens

    def _decode(self, token: int) -> str:
        self._tokens.append(token)
        self._fresh += 1
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(REPLACEMENT) and self._fresh < CHARACTER_TOKENS:
            whole = text.rstrip(REPLACEMENT)
            if not whole.startswith(self._known) or whole == self._known:
                return ""
            # The token ends a character and begins another.
            new, self._known, self._fresh = whole[len(self._known) :], whole, 1
            return new
        new = text[len(self._known) :]
        self._groups.append(len(self._tokens) - sum(self._groups))
        while len(self._tokens) - self._groups[0] >= CONTEXT_TOKENS:
            del self._tokens[: self._groups.popleft()]
        self._known = self._tokenizer.decode(self._tokens)
        self._fresh = 0
        return new

    def _beginning(self, text: str) -> int:
        """Length of the longest end of a text that is the beginning of a stop."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) and len(stop) > length for stop in self._stop):
                return length
        return 0
