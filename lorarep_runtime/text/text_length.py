"""How many characters a token can stand for: what a text's length says about its number of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Any

KEPT_BY_NORMALIZERS: Mapping[str, int] = {
    "Prepend": 1,
    "Lowercase": 1,
    "ByteLevel": 1,
    "NFD": 1,
    "NFKD": 1,
    "NFC": 4,  # the most characters that a character decomposes into
    "NFKC": 4,
}
"""Normalizers that leave nothing out, and how many characters they make one of at most. `Replace` is apart."""
KEPT_BY_PRE_TOKENIZERS = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"}
"""Pre-tokenizers that leave nothing out. `Split` and `Punctuation` do so only if they remove what they split at."""
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
EACH_BYTE = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000)]))
"""A text that has each byte that UTF-8 uses."""


def characters_of_a_token(backend: Any) -> int | None:
    """The most characters of a text that one token can stand for.

    Args:
        backend: a `tokenizers.Tokenizer`.

    Returns:
        None where that may be any number: some part leaves characters out, as those do that collapse spaces, or one
        token stands for a run of unknown characters.
    """
    normalizer, vocabulary = backend.normalizer, backend.get_vocab()
    merged = _merged_by_normalizer(_state(normalizer))
    added = backend.get_added_tokens_decoder().values()
    if (
        merged is None
        or not _pre_tokenizer_keeps_all(_state(backend.pre_tokenizer))
        or not _model_keeps_all(backend, vocabulary)
        or any(token.lstrip or token.rstrip for token in added)  # they take all spaces beside them
    ):
        return None
    # Of the normalized text; a text of such tokens may have been another before.
    longest = max(map(len, vocabulary))
    if normalizer is not None:
        longest = max([longest, *(len(normalizer.normalize_str(token.content)) for token in added)])
    return ceil(longest * merged)


def _state(part: Any) -> dict[str, Any]:
    """A part as tokenizer.json has it; {} for none."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _merged_by_normalizer(normalizer: Mapping[str, Any]) -> Fraction | None:
    """Characters that it makes one of at most; None where it may leave any number out."""
    match normalizer:
        case {"type": "Sequence", "normalizers": parts}:
            merged = Fraction(1)
            for part in parts:
                if (own := _merged_by_normalizer(part)) is None:
                    return None
                merged *= own
            return merged
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if content:
            return max(Fraction(1), Fraction(len(pattern), len(content)))
        case {"type": kind}:
            return Fraction(KEPT_BY_NORMALIZERS[kind]) if kind in KEPT_BY_NORMALIZERS else None
    return Fraction(1)


def _pre_tokenizer_keeps_all(pre_tokenizer: Mapping[str, Any]) -> bool:
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": parts}:
            return all(map(_pre_tokenizer_keeps_all, parts))
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return bool(behavior != "Removed")
        case {"type": kind}:
            return kind in KEPT_BY_PRE_TOKENIZERS
    return True


def _model_keeps_all(backend: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether no character is left out for being unknown, nor one of a run that one token stands for."""
    model = backend.model
    kind = type(model).__name__
    if kind not in ("BPE", "Unigram"):
        return False
    if kind == "Unigram":  # it makes one token of a run of unknown characters, or else bytes of them
        return vocabulary.keys() >= BYTE_TOKENS and bool(json.loads(model.__getstate__())["byte_fallback"])
    if vocabulary.keys() >= BYTE_TOKENS and model.byte_fallback:
        return True
    return (model.unk_token is not None and not model.fuse_unk) or _knows_all_bytes(backend, vocabulary)


def _knows_all_bytes(backend: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether texts become bytes before the model, and it knows each byte that UTF-8 uses."""
    from tokenizers.normalizers import ByteLevel

    parts = {kind for part in (backend.normalizer, backend.pre_tokenizer) for kind in _types(_state(part))}
    return "ByteLevel" in parts and vocabulary.keys() >= set(ByteLevel().normalize_str(EACH_BYTE))


def _types(part: Mapping[str, Any]) -> set[str]:
    inner = [*part.get("normalizers", ()), *part.get("pretokenizers", ())]
    return {part.get("type", ""), *(kind for one in inner for kind in _types(one))}
