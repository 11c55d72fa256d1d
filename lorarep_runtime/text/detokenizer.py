"""Incremental detokenization: the text of an answer while its tokens are generated."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import partial

from lorarep_runtime.text.token_bytes import Kind
from lorarep_runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Decoders give it for bytes that are no character, or none yet."""
CHARACTER_TOKENS = 4
"""Most tokens of one character: UTF-8 has up to four bytes."""
UTF8 = partial(codecs.getincrementaldecoder("utf-8"), errors="replace")
"""Makes a decoder of bytes that come piece by piece."""
CONTEXT_TOKENS = 6
"""Least number of earlier tokens that new ones are decoded with. Decoders treat the first token of a text differently:
some drop its space."""


class TextStream:
    """The text of one answer, piece by piece. A piece is final: it has whole characters, and no part of a stop string.

    Args:
        tokenizer: of the request.
        stop: strings that end the answer, also where one is the text of a special token, which has none in the answer.
        prompt: tokens before the answer, which the first pieces depend on.
        special_tokens: whether the text has the texts of special tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
        *,
        special_tokens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_texts = tokenizer.special_texts if special_tokens else {}
        self._stop = stop
        self._stop_tokens = {tokenizer.special_token(text): text for text in stop}
        self._bytes = tokenizer.token_bytes
        self._utf8 = UTF8()
        """Has the bytes of an unfinished character."""
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        """The context of the next tokens, followed by the tokens of an unfinished character."""
        self._known: str | None = None
        """The text of these tokens, as far as it has been given out or held back; None until it is needed."""
        self._fresh = 0
        """Number of tokens since the last one that ended a character, where the bytes of tokens are unknown."""
        if self._bytes.kind is Kind.UNKNOWN and tokenizer.decode(self._tokens).endswith(REPLACEMENT):
            self._tokens.clear()  # the prompt ends inside a character, which the answer must not be held for
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

    def _decode(self, token: int) -> str:
        """The text that a token adds; "" inside a character."""
        if (special := self._special_texts.get(token)) is not None:
            return self._utf8_end() + special
        own = self._bytes.of(token)
        if own is None:
            # Bytes before it that are no character never become one.
            return self._utf8_end() + self._decode_in_context(token)
        if own and self._bytes.kind is not Kind.BYTE_LEVEL:
            self._tokens.append(token)
            self._known = None
            self._trim()
        return self._utf8.decode(own)

    def _utf8_end(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _decode_in_context(self, token: int) -> str:
        """The text that a token adds to the text of those before it: as much as decoding makes longer."""
        if self._known is None:
            text = self._tokenizer.decode(self._tokens)
            self._known = text.rstrip(REPLACEMENT) if self._fresh else text
        known = self._known
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        self._fresh += 1
        if self._bytes.kind is Kind.UNKNOWN and text.endswith(REPLACEMENT) and self._fresh < CHARACTER_TOKENS:
            text = text.rstrip(REPLACEMENT)
            if not text.startswith(known) or text == known:
                return ""
            self._fresh = 1  # the token ends one character and begins another
        else:
            self._fresh = 0
        self._known = text
        self._trim()
        return text[len(known) :]

    def _trim(self) -> None:
        """Drops the oldest tokens now and then, since each token is decoded with all of them."""
        if len(self._tokens) >= 2 * CONTEXT_TOKENS:
            del self._tokens[:-CONTEXT_TOKENS]
            self._known = None

    def _held_length(self, text: str) -> int:
        """Length of the longest end of a text that is the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) and len(stop) > length for stop in self._stop):
                return length
        return 0
