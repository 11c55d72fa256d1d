"""Text of tokens that are parts of characters, or of none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorarep_runtime.text.detokenizer import REPLACEMENT, TextStream
from lorarep_runtime.text.tokenizer import Tokenizer
from tests.support.models import save_tokenizer

EMOJI = "🦜"
STRADDLING = 1
"""A token that ends one character and begins another."""


def saved(folder: Path, fast: Fast) -> Tokenizer:
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte, as its id says; 257 and 258 are special."""
    folder = tmp_path_factory.mktemp("bytes")
    save_tokenizer(folder)
    return Tokenizer(folder)


def with_bytes(folder: Path, decoder: Any) -> Tokenizer:
    """A vocabulary of "</s>", a word, U+FFFD, and a token for each byte, from 3 on."""
    vocab = {"</s>": 0, "▁one": 1, REPLACEMENT: 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    fast = Fast(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    fast.decoder = decoder
    return saved(folder, fast)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As SentencePiece's: the whole of a run of bytes is replaced if it is no UTF-8."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return with_bytes(tmp_path_factory.mktemp("fallback"), decoders.Sequence(parts))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The bytes of "中", cut so that a token ends one of them and begins another."""
    names = ["".join(map(in_vocabulary, part)) for part in (b"\xe4\xb8", b"\xad\xe4\xb8", b"\xad")]
    fast = Fast(models.BPE(vocab={name: i for i, name in enumerate([*names, "</s>"])}, merges=[]))
    fast.decoder = decoders.ByteLevel()
    return saved(tmp_path_factory.mktemp("pairs"), fast)


@pytest.fixture(scope="module")
def other_parts(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its decoder says nothing about the bytes of tokens."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Fast(models.BPE(vocab={**vocab, "</s>": 256}, merges=[]))
    fast.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace("a", "b")])
    return saved(tmp_path_factory.mktemp("parts"), fast)


def in_vocabulary(byte: int) -> str:
    """The character of a byte-level vocabulary that stands for a byte."""
    hidden = [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or b >= 174)]
    return chr(256 + hidden.index(byte)) if byte in hidden else chr(byte)


def ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """A token for each byte."""
    names = [f"<0x{byte:02X}>" for byte in data]
    found = tokenizer._tokenizer.convert_tokens_to_ids(names)
    return (
        found
        if found and found[0] is not None
        else tokenizer._tokenizer.convert_tokens_to_ids([in_vocabulary(byte) for byte in data])
    )


def shown(tokenizer: Tokenizer, tokens: list[int], prompt: list[int] | None = None) -> str:
    text = TextStream(tokenizer, prompt=prompt or [])
    return "".join([*(text.feed(token)[0] for token in tokens), text.finish()])


@pytest.mark.parametrize("kind", ["of_bytes", "fallback"])
def test_a_replacement_character_at_the_end_is_kept(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokens = ids(tokenizer, f"ab{REPLACEMENT}".encode())
    assert shown(tokenizer, tokens) == f"ab{REPLACEMENT}" == tokenizer.decode(tokens)
    assert shown(tokenizer, tokens[:-1]) == "ab"  # two bytes of a character that may come yet


def test_a_replacement_character_that_is_a_token_is_kept(fallback: Tokenizer) -> None:
    assert shown(fallback, [1, 2], prompt=[1]) == f" one{REPLACEMENT}"


@pytest.mark.parametrize("kind", ["of_bytes", "fallback"])
@pytest.mark.parametrize("stray", [b"\x80", b"\x80\x80\x80", b"\xff" * 5, b"\xf0\x9f", b"\xe4\xb8"], ids=repr)
def test_after_stray_bytes_an_emoji_is_an_emoji(kind: str, stray: bytes, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    text = shown(tokenizer, ids(tokenizer, b"a" + stray + f"{EMOJI}é".encode() + stray + EMOJI.encode()))
    assert text.replace(REPLACEMENT, "") == f"a{EMOJI}é{EMOJI}"
    assert text[1] == REPLACEMENT


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*b"ab\x80\xbf\xc3\xa9\xe4\xb8\xad\xf0\x9f\xa6\x9c\xff", 257, 258]), max_size=30))
def test_any_bytes_are_streamed_as_they_are_decoded(of_bytes: Tokenizer, numbers: list[int]) -> None:
    tokens = [number if number > 256 else ids(of_bytes, bytes([number]))[0] for number in numbers]
    text = shown(of_bytes, tokens)
    assert of_bytes.decode(tokens) in (text, text + REPLACEMENT)  # what may become a character yet is left out


def test_tokens_that_end_a_character_and_begin_another_are_not_decoded_anew(
    pairs: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [0, *[STRADDLING] * 300, 2]
    assert shown(pairs, tokens) == "中" * 301 == pairs.decode(tokens)
    lengths = [0]
    decode = Tokenizer.decode

    def counted(tokenizer: Tokenizer, tokens: list[int]) -> str:
        lengths.append(len(tokens))
        return decode(tokenizer, tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    shown(pairs, tokens)
    assert max(lengths) < 20


@settings(max_examples=100, deadline=None)
@given(st.text("aé中🦜 ", max_size=30))
def test_with_a_decoder_of_other_parts_text_is_whole_too(other_parts: Tokenizer, text: str) -> None:
    assert shown(other_parts, ids(other_parts, text.encode())) == text.replace("a", "b")


def test_a_token_costs_no_more_late_in_an_answer(fallback: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    decode = fallback.decode

    def counted(tokens: list[int]) -> str:
        counts.append(len(tokens))
        return decode(tokens)

    monkeypatch.setattr(fallback, "decode", counted)
    stream = TextStream(fallback, (), [1])
    for _ in range(100):
        stream.feed(1, may_stop=True)
    assert counts
    assert max(counts) < 20


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_texts_of_special_tokens_are_there_where_they_are_wanted(
    of_bytes: Tokenizer, tmp_path: Path, kind: str
) -> None:
    """As `transformers` decodes them."""
    if kind == "bytes":
        tokenizer, tokens = of_bytes, [104, 258, 105, 195, 257, 105]
    else:
        fast = Fast(models.WordLevel({"</s>": 0, "\u2581one": 1, "\u2581two": 2}))
        fast.decoder = decoders.Metaspace()
        tokenizer, tokens = saved(tmp_path, fast), [1, 2, 0, 1, 0, 0, 2]
    for special in (False, True):
        text = TextStream(tokenizer, special_tokens=special)
        streamed = "".join(text.feed(token)[0] for token in tokens) + text.finish()
        assert streamed == tokenizer._tokenizer.decode(tokens, skip_special_tokens=not special)
