"""Prompts that are too long are refused by arithmetic, and no others."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fmaas import generation_pb2 as fmaas_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from lorarep.v1 import generation_pb2 as pb
from lorarep_server.requests import messages
from lorarep_server.requests.message_bounds import MessageBounds, most_bytes
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Fast
from transformers import PreTrainedTokenizerFast

from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.text.text_length import characters_of_a_token
from lorarep_runtime.text.tokenizer import Tokenizer
from tests.support.models import save_tokenizer

WORDS = {"?": 0, "a": 1, "b": 2, "\u1f82": 3, "▁": 4, " ": 5}


def of_words() -> Fast:
    return Fast(models.WordLevel(WORDS, unk_token="?"))


def of_characters(**options: Any) -> Fast:
    return Fast(models.BPE(vocab=WORDS, merges=[], **options))


def with_strip() -> Fast:
    fast = of_characters(unk_token="?")
    fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    return fast


def with_collapsed_spaces() -> Fast:
    fast = of_characters(unk_token="?")
    fast.normalizer = normalizers.Replace(Regex(" +"), " ")
    return fast


def with_shorter_text() -> Fast:
    fast = of_characters(unk_token="?")
    fast.normalizer = normalizers.Sequence([normalizers.Replace("x" * 50, "a")])
    return fast


def with_a_text_shorter_by_a_third() -> Fast:
    fast = of_characters(unk_token="?")
    fast.normalizer = normalizers.Replace("xyz", "ab")
    return fast


def composed() -> Fast:
    fast = of_characters(unk_token="?")
    fast.normalizer = normalizers.NFC()
    return fast


def without_spaces() -> Fast:
    fast = of_words()
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast


def without_what_it_splits_at() -> Fast:
    fast = of_characters(unk_token="?")
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return fast


def with_an_added_token_that_takes_spaces() -> Fast:
    fast = of_characters(unk_token="?")
    fast.add_tokens([AddedToken("<mask>", rstrip=True)])
    return fast


def with_fused_unknowns() -> Fast:
    return of_characters(unk_token="?", fuse_unk=True)


def of_pieces() -> Fast:
    return Fast(models.Unigram([("?", 0.0), ("a", -1.0)], 0, False))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (with_strip, " " * 3000 + "x" + " " * 3000),
        (with_collapsed_spaces, "a" + " " * 3000 + "b"),
        (with_shorter_text, "x" * 100),
        (with_a_text_shorter_by_a_third, "xyz" * 2),
        (composed, unicodedata.normalize("NFD", "\u1f82") * 4),
        (without_spaces, "a" + " " * 3000 + "b"),
        (without_what_it_splits_at, "a" + " " * 3000 + "b"),
        (with_an_added_token_that_takes_spaces, "a<mask>" + " " * 3000 + "b"),
        (with_fused_unknowns, "a" + "z" * 3000 + "b"),
        (of_characters, "a" + "z" * 3000 + "b"),
        (of_words, "z" * 3000),
        (of_pieces, "a" + "z" * 3000 + "a"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_text_that_its_tokenizer_makes_shorter_is_not_refused(
    make: Callable[[], Fast], text: str, tmp_path: Path
) -> None:
    PreTrainedTokenizerFast(tokenizer_object=make(), unk_token="?").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    tokens = messages.prompt_tokens(pb.Prompt(text=text), tokenizer, max_tokens=4)
    assert len(tokens) <= 4


PARTS = st.sampled_from(
    [
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
        normalizers.Replace("xyz", "a"),
        normalizers.Lowercase(),
        normalizers.NFC(),
        normalizers.NFKC(),
        normalizers.NFD(),
    ]
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(PARTS, max_size=3),
    st.booleans(),
    st.text(max_size=30)
    | st.text("xyz \u1f82\u0301e", max_size=30).map(lambda text: unicodedata.normalize("NFD", text)),
)
def test_no_text_has_more_characters_than_the_bound(
    parts: list[normalizers.Normalizer], of_bytes: bool, text: str
) -> None:
    vocab = dict.fromkeys(BYTES) if of_bytes else WORDS
    vocab = {token: number for number, token in enumerate(vocab)}
    fast = Fast(models.BPE(vocab=vocab, merges=[], unk_token=None if of_bytes else "?"))
    fast.normalizer = normalizers.Sequence(parts)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel() if of_bytes else pre_tokenizers.Metaspace()
    fast.add_tokens(["\u1f82 xyz"])
    most = characters_of_a_token(fast)
    assert most is not None
    assert len(text) <= most * len(fast.encode(text).ids)


BOUNDS = MessageBounds(max_tokens=512, max_prompts=8)
PROMPT_BYTES = most_bytes(512)
GENERATE, TOKENIZE = "/fmaas.GenerationService/Generate", "/fmaas.GenerationService/Tokenize"


def prompts(*texts: str, **fields: Any) -> bytes:
    one = [fmaas_pb2.GenerationRequest(text=text) for text in texts]
    return fmaas_pb2.BatchedGenerationRequest(requests=one, model_id="any", **fields).SerializeToString()


@pytest.mark.parametrize(
    ("method", "data", "named"),
    [
        (GENERATE, prompts(*["x"] * 9), "requests: 9"),
        (GENERATE, b"\x1a\x00" * (8 << 20), "requests: 9"),
        (TOKENIZE, b"\x12\x00" * (8 << 20), "requests: 9"),
        (GENERATE, prompts("a", "x" * PROMPT_BYTES), "requests: "),
        (GENERATE, prompts("a", adapter_id="x" * (256 << 10)), "request: "),
        (GENERATE, b"\x08\x00" * (8 << 20), "request: "),
        (GENERATE, b"\x4b\x4c" + prompts(*["x"] * 9), "request: has a group"),
        (TOKENIZE, b"\x4c", "request: has a group"),
        ("/fmaas.GenerationService/GenerateStream", b"x" * (PROMPT_BYTES + 1), "request: "),
        ("/lorarep.v1.GenerationService/Generate", b"x" * (PROMPT_BYTES + 1), "request: "),
    ],
    ids=[
        "prompts",
        "empty prompts",
        "empty texts",
        "a prompt",
        "a field",
        "fields",
        "group",
        "its end",
        "stream",
        "v1",
    ],
)
def test_a_request_that_no_prompt_needs_is_refused_before_it_is_parsed(method: str, data: bytes, named: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        BOUNDS.check(method, data)
    assert str(error.value).startswith(named)


@given(st.lists(st.text(max_size=5), max_size=8), st.binary(max_size=40))
def test_what_may_be_answered_and_what_is_no_message_are_left_to_the_parser(texts: list[str], noise: bytes) -> None:
    params = fmaas_pb2.Parameters(stopping=dict(stop_sequences=["x" * 1024] * 16))
    BOUNDS.check(GENERATE, prompts(*texts, adapter_id="any", params=params))
    try:
        BOUNDS.check(TOKENIZE, noise)
    except InvalidArgument as error:
        assert "group" in str(error)  # noqa: PT017


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path)
    return Tokenizer(tmp_path)


@pytest.mark.parametrize("trusted", [True, False])
def test_what_a_template_writes_is_bounded_before_it_is_tokenized(
    tokenizer: Tokenizer, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer._tokenizer, "encode", None)  # a call would be another error
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    writes = tokenizer.with_chat_template("{{ messages[0].content * 1000 }}", trusted=trusted)
    with pytest.raises(InvalidArgument, match=r"^prompt\.chat: .*2000 characters") as error:
        messages.prompt_tokens(pb.Prompt(chat=chat), writes, max_tokens=100)
    assert error.value.field == "prompt.chat"


def test_what_a_template_leaves_out_does_not_count(tokenizer: Tokenizer) -> None:
    """Some leave out what a model has thought before its earlier answers."""
    chat = pb.Chat(messages=[pb.ChatMessage(role="assistant", content="thought " * 1000 + "!")])
    shortens = tokenizer.with_chat_template("{{ messages[0].content[-1] }}")
    assert messages.prompt_tokens(pb.Prompt(chat=chat), shortens, max_tokens=4) == tuple(tokenizer.encode("!"))
