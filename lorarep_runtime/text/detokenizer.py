"""Incremental detokenization: the text of an answer while its tokens are generated."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from lorarep_runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Decoders give it for bytes that are no character, or none yet."""
CHARACTER_TOKENS = 4
"""Most tokens of one character: UTF-8 has up to four bytes."""
CONTEXT_TOKENS = 6
"""Least number of earlier tokens that new ones are decoded with. Decoders treat the first token of a text differently:
some drop its space."""


class TextStream:
    """The text of one answer, piece by piece. A piece is final: it has whole characters, and no part of a stop string.

    Args:
        tokenizer: of the request.
        stop: strings that end the answer, also where one is the text of a special token, which has none in the answer.
        prompt: tokens before the answer, which the first pieces depend on.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._stop_tokens = {tokenizer.special_token(text): text for text in stop}
        self._tokens = self._context(prompt)
        """The context of the next tokens, followed by the tokens of an unfinished character."""
        self._known = tokenizer.decode(self._tokens)
        """The text of these tokens, as far as it has been given out or held back."""
        self._groups = deque([len(self._tokens)])
        """Lengths of the groups that the tokens consist of; each group ends with a whole character.

        The context drops whole groups only. One that began inside a character could become replacements from end to
        end: some decoders replace a whole run of bytes if it is no text in UTF-8.
        """
        self._fresh = 0
        """Number of tokens since the last one that ended a character."""
        self._held = ""
        """Text that is held back, since it may be the beginning of a stop string."""

    def feed(self, token: int, *, may_stop: bool = True) -> tuple[str, str]:
        """Adds a token of the answer.

        Args:
            token: its id.
            may_stop: whether a stop string that the token completes ends the answer; if not, it is text like any other.

        Returns:
            The next piece of text, and the stop string that ended the answer, or "". After one nothing may be fed.
        """
        if may_stop and token in self._stop_tokens:
            return self._held, self._stop_tokens[token]
        text = self._held + self._decode(token)
        if may_stop and (met := [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]):
            at, stop = min(met)
            return text[:at], stop
        kept = self._held_length(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], ""

    def finish(self) -> str:
        """The last piece of an answer that no stop string ended. An unfinished character is left out."""
        return self._held

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, from the beginning of a character on; none if the prompt ends inside one."""
        tokens, text = [], ""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + CHARACTER_TOKENS):
            tokens = list(prompt[-count:])
            text = self._tokenizer.decode(tokens)
            if not text.startswith(REPLACEMENT) and not text.endswith(REPLACEMENT):
                break
        return [] if text.endswith(REPLACEMENT) else tokens

    def _decode(self, token: int) -> str:
        """The text that a token adds; "" inside a character."""
        self._tokens.append(token)
        self._fresh += 1
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(REPLACEMENT) and self._fresh < CHARACTER_TOKENS:
            whole = text.rstrip(REPLACEMENT)
            if not whole.startswith(self._known) or whole == self._known:
                return ""
            # The token ends one character and begins another.
            new, self._known, self._fresh = whole[len(self._known) :], whole, 1
            return new
        new = text[len(self._known) :]
        self._groups.append(len(self._tokens) - sum(self._groups))
        while len(self._tokens) - self._groups[0] >= CONTEXT_TOKENS:
            del self._tokens[: self._groups.popleft()]
        self._known = self._tokenizer.decode(self._tokens)
        self._fresh = 0
        return new

    def _held_length(self, text: str) -> int:
        """Length of the longest end of a text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) and len(stop) > length for stop in self._stop):
                return length
        return 0
