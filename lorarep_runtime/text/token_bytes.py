"""The bytes of tokens, as far as a tokenizer's decoder makes text of each token's own bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any

from lorarep_runtime.errors import FailedPrecondition
from lorarep_runtime.text.foreign import foreign_code

SHOWN_AS_THEMSELVES = (*range(33, 127), *range(161, 173), *range(174, 256))
HIDDEN = sorted(set(range(256)) - set(SHOWN_AS_THEMSELVES))
BYTES_OF_CHARACTERS = {chr(byte): byte for byte in SHOWN_AS_THEMSELVES} | {
    chr(256 + i): byte for i, byte in enumerate(HIDDEN)
}
"""The byte that each character of a byte-level vocabulary stands for (GPT-2's)."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
AFTER_BYTES = {"Fuse", "Strip"}
"""Decoders that may follow on one of bytes: they change at most the beginning and the end of a whole text."""


class Kind(Enum):
    """What a decoder says about the bytes of tokens."""

    BYTE_LEVEL = "each token's text is its bytes"
    BYTE_FALLBACK = "some tokens are a byte, and all others are whole characters"
    WHOLE = "all tokens are whole characters"
    UNKNOWN = "any token may be part of a character"


class TokenBytes:
    """The bytes of a tokenizer's tokens.

    Args:
        tokenizer: as `transformers` has it.
        special: ids of the tokens that no text shows.
    """

    def __init__(self, tokenizer: Any, special: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(special)
        self.kind = _kind(tokenizer)
        self._known: dict[int, bytes | None] = {}

    def of(self, token: int) -> bytes | None:
        """The bytes that a token adds to a text wherever it is; None where that depends on the tokens before it."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def of_all(self, count: int) -> list[bytes]:
        """The bytes of each token below `count` in the middle of a text; b"" for those that no text shows.

        Raises:
            FailedPrecondition: the decoder may make anything of tokens.
        """
        if self.kind is Kind.UNKNOWN:
            raise FailedPrecondition("its decoder says of no token what text it is", field="tokenizer")
        known = min(count, max(self._tokenizer.get_vocab().values()) + 1)
        if self.kind is Kind.BYTE_LEVEL:
            found = [self.of(token) or b"" for token in range(known)]
        else:
            with foreign_code("it cannot decode its tokens"):
                found = self._in_context(known)
        return found + [b""] * (count - known)

    def _in_context(self, count: int) -> list[bytes]:
        """The bytes of tokens after those of a letter: decoders treat the first token of a text differently."""
        backend = self._tokenizer.backend_tokenizer
        before = backend.encode("x", add_special_tokens=False).ids
        text = backend.decode(before)
        with_each = backend.decode_batch([[*before, token] for token in range(count)])
        pieces = self._tokenizer.convert_ids_to_tokens(range(count))
        found = []
        for token, (piece, whole) in enumerate(zip(pieces, with_each, strict=True)):
            byte = BYTE_TOKEN.fullmatch(piece or "") if self.kind is Kind.BYTE_FALLBACK else None
            if byte is not None:
                found.append(bytes.fromhex(byte[1]))
            elif token in self._special or piece is None or not whole.startswith(text):
                found.append(b"")
            else:
                found.append(whole[len(text) :].encode())
        return found

    def _read(self, token: int) -> bytes | None:
        with foreign_code("it cannot name a token"):
            piece = None if token in self._special else self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""  # decoders leave it out
        if self.kind is Kind.BYTE_LEVEL:
            try:
                return bytes(BYTES_OF_CHARACTERS[character] for character in piece)
            except KeyError:  # an added token that is no text of bytes
                return str(piece).encode()
        byte = BYTE_TOKEN.fullmatch(piece) if self.kind is Kind.BYTE_FALLBACK else None
        return None if byte is None else bytes.fromhex(byte[1])


def _kind(tokenizer: Any) -> Kind:
    if not tokenizer.is_fast:
        return Kind.UNKNOWN
    decoder = tokenizer.backend_tokenizer.decoder
    state = {} if decoder is None else json.loads(decoder.__getstate__())
    parts = [part["type"] for part in state.get("decoders", [state] if state else [])]
    if "ByteLevel" in parts:
        return Kind.BYTE_LEVEL if {"ByteLevel", "Fuse"} >= set(parts) else Kind.UNKNOWN
    if "ByteFallback" in parts:
        rest = set(parts[parts.index("ByteFallback") + 1 :])
        return Kind.BYTE_FALLBACK if rest <= AFTER_BYTES else Kind.UNKNOWN
    return Kind.UNKNOWN if "Sequence" in parts else Kind.WHOLE
