"""Vocabularies of grammars: the bytes of each token in a text, as the tokenizer's own decoder says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorarep_runtime.errors import Exhausted, FailedPrecondition
from lorarep_runtime.request import StructuredOutput
from lorarep_runtime.text import lark
from lorarep_runtime.text.grammar import Grammars, allowed
from lorarep_runtime.text.tokenizer import Tokenizer
from tests.support.models import save_tokenizer

TEXTS = ["one two three two", 'a {"b": [1, 2.5]}\n\t "ßé 😀"', "<tool> one<tool> two", "three"]


def byte_level() -> Fast:
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Fast(
        models.BPE(vocab={**vocab, "Ġt": 256, "Ġtw": 257, "Ġtwo": 258}, merges=[("Ġ", "t"), ("Ġt", "w"), ("Ġtw", "o")])
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def byte_fallback() -> Fast:
    """Of SentencePiece's kind: decoding drops the first token's space."""
    vocab = {name: i for i, name in enumerate(["<unk>", "▁", "one", "▁one", "▁two", "three"])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    fast = Fast(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


def metaspace() -> Fast:
    vocab = [("<unk>", -9.0), *((piece, -1.0) for piece in ("▁one", "▁two", "▁three", "▁<", "▁"))]
    vocab += [(chr(code), -2.0) for code in range(33, 127)] + [("ß", -2.0), ("é", -2.0), ("😀", -2.0)]
    fast = Fast(models.Unigram(vocab, unk_id=0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    return fast


@pytest.mark.parametrize("make", [byte_level, byte_fallback, metaspace])
def test_tokens_together_are_the_text(tmp_path: Path, make: Callable[[], Fast]) -> None:
    own = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")
    own.add_tokens(["<tool>"])
    own.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    rows = tokenizer.largest_id + 70
    vocabulary = tokenizer.vocabulary(rows)
    assert len(vocabulary.tokens) == rows
    assert {own.eos_token_id, rows - 1} <= vocabulary.special
    assert own.convert_tokens_to_ids("<tool>") not in vocabulary.special
    for text in TEXTS:
        before, tokens = own.encode("x", add_special_tokens=False), own.encode(text, add_special_tokens=False)
        expected = own.decode([*before, *tokens])[len(own.decode(before)) :]
        assert b"".join(vocabulary.tokens[token] for token in tokens).decode() == expected
    assert tokenizer.with_chat_template("x").vocabulary(rows) is vocabulary


def test_a_decoder_that_may_do_anything_is_refused(tmp_path: Path) -> None:
    fast = byte_level()
    fast.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")])
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(FailedPrecondition) as error:
        Grammars().compile(StructuredOutput("regex", "a"), Tokenizer(tmp_path), 300, [1])
    assert error.value.field == "tokenizer"


def test_a_mask_has_the_tokens_that_may_come_and_no_rows_without_one(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    grammar = Grammars().compile(StructuredOutput("regex", "(ab|Ac*)"), tokenizer, 300, [258])
    ids = {chr(byte): tokenizer.encode(chr(byte))[-1] for byte in range(33, 127)}

    def may_come(without: tuple[int, ...] = ()) -> set[int]:
        return set(allowed(grammar.mask(without).unsqueeze(0), 300)[0].nonzero().flatten().tolist())

    assert may_come() == {ids["a"], ids["A"]}
    assert may_come((ids["a"],)) == {ids["A"]}
    grammar.advance(ids["A"])
    assert may_come() == {ids["c"], 258}
    assert may_come((258,)) == {ids["c"]}
    assert may_come((258, ids["c"])) == {ids["c"], 258}  # some token has to come


def test_forms_of_others_are_no_reason_to_wait_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(tmp_path)
    monkeypatch.setattr(lark, "WAITING_SECONDS", 0.01)
    for _ in range(lark.MAX_CALLERS):
        lark.places.acquire()
    try:
        with pytest.raises(Exhausted):
            Grammars().compile(StructuredOutput("regex", "a"), Tokenizer(tmp_path), 300, [258])
    finally:
        lark.places.release(lark.MAX_CALLERS)
