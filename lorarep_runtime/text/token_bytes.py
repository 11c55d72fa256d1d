"""The bytes of tokens, as far as a tokenizer's decoder makes text of each token's own bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any

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
