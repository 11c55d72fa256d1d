"""Text that streams: always whole characters, never part of a stop, and in the end what decoding at once gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.text.detokenizer import REPLACEMENT, TextStream
from lorarep_runtime.text.tokenizer import Tokenizer, fits
from tests.support.models import VOCAB, save_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte: every character but ASCII is split."""
    folder = tmp_path_factory.mktemp("bytes")
    save_tokenizer(folder)
    return Tokenizer(folder)


BYTES = 5
"""Where those begin in the vocabulary of `spaced`."""


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of SentencePiece's kind: decoding drops the first token's space, so a token's text depends on what is before."""
    folder = tmp_path_factory.mktemp("spaced")
    vocab = {name: i for i, name in enumerate(["<unk>", "▁one", "▁two", "three", "</s>"])}
    vocab |= {f"<0x{byte:02X}>": BYTES + byte for byte in range(256)}
    fast = Fast(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(folder)
    return Tokenizer(folder)


def stream(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...] = (), prompt: list[int] | None = None):
    """Pieces shown, and whether a stop was met."""
    text = TextStream(tokenizer, stop, prompt or [])
    pieces = []
    for token in tokens:
        piece, met = text.feed(token)
        pieces.append(piece)
        if met:
            return pieces, True
    return [*pieces, text.finish()], False


@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str, prompt: str) -> None:
    pieces, _ = stream(tokenizer, tokenizer.encode(text), prompt=tokenizer.encode(prompt))
    assert "".join(pieces) == text
    assert all(piece.encode() for piece in pieces if piece)  # each by itself is valid UTF-8


def test_no_piece_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, tokenizer.encode("aé🦜z"))
    assert pieces == ["a", "", "é", "", "", "", "🦜", "z", ""]


def test_a_broken_character_at_the_end_is_left_out(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, tokenizer.encode("a🦜")[:-1])[0]) == "a"


def test_bytes_that_are_no_character_become_replacements(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("é")[:1] + tokenizer.encode("abcd")
    assert "".join(stream(tokenizer, broken)[0]) == f"{REPLACEMENT}abcd"


def test_tokens_past_the_vocabulary_are_no_text_as_in_transformers(tokenizer: Tokenizer) -> None:
    """Many bases have more rows than their tokenizer has tokens."""
    past = [tokenizer.largest_id + 1, VOCAB - 1]
    theirs = AutoTokenizer.from_pretrained(tokenizer._folder)
    a, b = tokenizer.encode("a"), tokenizer.encode("é")
    tokens = [*past, *a, *past, *b[:1], past[0], *b, *past, *a]
    shown, _ = stream(tokenizer, tokens, prompt=past)
    assert "".join(shown) == theirs.decode(tokens, skip_special_tokens=True) == tokenizer.decode(tokens)
    assert [tokenizer.token_text(token) for token in past] == ["", ""]


def test_a_prompt_that_ends_inside_a_character_does_not_swallow_the_answer(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("é")
    assert "".join(stream(tokenizer, tokenizer.encode("ab"), prompt=half[:1])[0]) == "ab"


def test_a_space_after_the_prompt_is_kept(spaced: Tokenizer) -> None:
    """Decoded by itself the answer would lose its first space."""
    assert "".join(stream(spaced, [2, 3, 1], prompt=[1])[0]) == " twothree one"
    assert "".join(stream(spaced, [2, *in_bytes("é"), 1] * 5, prompt=[1])[0]) == " twoé one" * 5


def in_bytes(text: str) -> list[int]:
    return [BYTES + byte for byte in text.encode()]


pieces_of_text = st.lists(st.sampled_from([" one", " two", "three", "é", "中", "🎉", "👨‍👩", "🇫🇷"]), max_size=12)


@settings(max_examples=500)
@given(pieces_of_text, pieces_of_text)
def test_runs_of_characters_in_bytes_are_streamed_whole(
    spaced: Tokenizer, prompt: list[str], answer: list[str]
) -> None:
    """A run of bytes that begins inside a character is replaced as a whole, the good ones too."""
    known = {" one": [1], " two": [2], "three": [3]}
    before, after = ([t for piece in text for t in known.get(piece) or in_bytes(piece)] for text in (prompt, answer))
    shown, _ = stream(spaced, after, prompt=[1, *before])
    assert "".join(shown) == "".join(answer)
    assert all(piece.encode() for piece in shown if piece)


@settings(max_examples=300)
@given(st.text("ab<>", max_size=30), st.lists(st.text("ab<>", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_part_of_a_stop_is_ever_shown(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    pieces, met = stream(tokenizer, tokenizer.encode(text), tuple(stops))
    shown = "".join(pieces)
    assert met == any(stop in text for stop in stops)
    if not met:
        assert shown == text
        return
    # The stop that is complete first ends it; of several at once the one that began first.
    end = min(text.index(stop) + len(stop) for stop in stops if stop in text)
    begin = min(text[:end].index(stop) for stop in stops if stop in text[:end])
    assert shown == text[:begin]
    for count in range(len(pieces)):
        assert text.startswith("".join(pieces[:count]))


def test_a_stop_across_characters_and_tokens(tokenizer: Tokenizer) -> None:
    pieces, met = stream(tokenizer, tokenizer.encode("ab ééé!"), ("éé",))
    assert (met, "".join(pieces)) == (True, "ab ")


def test_a_stop_that_may_not_end_it_yet_is_text(tokenizer: Tokenizer) -> None:
    text = TextStream(tokenizer, ("b",))
    pieces = [text.feed(token, may_stop=i > 1) for i, token in enumerate(tokenizer.encode("abab"))]
    assert "".join(piece for piece, _ in pieces) == "aba"
    assert pieces[-1][1]


def test_a_stop_that_is_a_special_token_stops_there(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("a</"), 258, *tokenizer.encode("b")]
    pieces, met = stream(tokenizer, tokens, ("never", "</s>"))
    assert (met, "".join(pieces)) == (True, "a</")
    assert TextStream(tokenizer, ("</s>",)).feed(258) == ("", "</s>")
    assert TextStream(tokenizer, ("</s>",)).feed(258, may_stop=False) == ("", "")
    assert "".join(stream(tokenizer, tokens, ("never",))[0]) == "a</b"


def test_of_several_stops_the_one_that_is_met_is_told(tokenizer: Tokenizer) -> None:
    text = TextStream(tokenizer, ("never", "bc", "b"))
    assert [text.feed(token) for token in tokenizer.encode("ab")] == [("a", ""), ("", "b")]


def test_a_text_is_cut_to_its_last_tokens_and_the_special_ones(tmp_path: Path) -> None:
    fast = Fast(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<s>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    expected = {5: [0, 2, 3, 4, 1], 4: [0, 3, 4, 1], 3: [0, 4, 1], 2: [0, 1]}
    assert {longest: tokenizer.encode("a b c", longest) for longest in expected} == expected
    assert tokenizer.encode("a b c", 6) == tokenizer.encode("a b c") == expected[5]
    with pytest.raises(InvalidArgument, match="longest: 1"):
        tokenizer.encode("a b c", 1)
    assert tokenizer.spans("a b c") == [(0, 0), (0, 1), (2, 3), (4, 5), (0, 0)]
    assert tokenizer.pieces([0, 4, 1, 5]) == ["<s>", "c", "</s>", ""]


def test_chat_is_the_templates_text(tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "hi"}]
    with_template = tokenizer.with_chat_template(TEMPLATE)
    assert with_template.chat(chat) == [257, *tokenizer.encode("user: hi\n>")]
    assert with_template.has_chat_template
    with pytest.raises(FailedPrecondition, match=r"prompt\.chat"):
        tokenizer.chat(chat)
    with pytest.raises(InvalidArgument, match="no such thing"):
        tokenizer.with_chat_template("{{ raise_exception('no such thing') }}").chat(chat)


@pytest.mark.parametrize("as_list", [True, False])
def test_of_several_named_templates_the_default_one_is_used(tmp_path: Path, as_list: bool) -> None:
    """As a list in the config (Command R), or as files of their own."""
    save_tokenizer(tmp_path)
    named = {"default": TEMPLATE, "tool_use": "{{ raise_exception('another') }}"}
    file = tmp_path / "tokenizer_config.json"
    listed = [{"name": name, "template": template} for name, template in named.items()]

    def save(names: list[str]) -> None:
        if as_list:
            templates = [one for one in listed if one["name"] in names]
            file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))
            return
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(named["tool_use"])
        if "default" in names:
            (tmp_path / "chat_template.jinja").write_text(TEMPLATE)

    chat = [{"role": "user", "content": "hi"}]
    save(["default", "tool_use"])
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.has_chat_template
    assert tokenizer.chat(chat) == [257, *tokenizer.encode("user: hi\n>")]
    save(["tool_use"])
    tokenizer = Tokenizer(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(FailedPrecondition, match=r"no chat template named \"default\", only \['tool_use'\]"):
        tokenizer.chat(chat)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_conversation_may_end_otherwise_than_with_a_question(tokenizer: Tokenizer, trusted: bool) -> None:
    """As `transformers` writes it."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    own = tokenizer.with_chat_template(template, trusted=trusted)
    told = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    for asks, continues in ((True, False), (False, False), (False, True)):
        expected = own._tokenizer.apply_chat_template(
            told,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=asks,
            continue_final_message=continues,
        )
        got = own.chat(told, asks_for_answer=asks, continues_last=continues)
        assert own.decode(got) == expected
    assert expected.endswith("Well")
    with pytest.raises(InvalidArgument) as error:
        own.chat(told, continues_last=True)
    assert error.value.field == "prompt.chat.add_generation_prompt"
    assert own.decode(own.chat([{"role": "developer", "content": "x"}])) == "<system>x;<a>"
    knows = own.with_chat_template("{% if messages[0].role == 'developer' %}yes{% endif %}", trusted=trusted)
    assert knows.decode(knows.chat([{"role": "developer", "content": "x"}])) == "yes"


def test_a_template_cannot_reach_python(tokenizer: Tokenizer) -> None:
    hostile = tokenizer.with_chat_template("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidArgument, match=r"prompt\.chat"):
        hostile.chat([{"role": "user", "content": "hi"}])


def test_end_tokens_are_of_tokenizer_and_configs(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, "9", null]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "text_config": {"eos_token_id": 8}}')
    assert Tokenizer(tmp_path).eos_ids == {5, 6, 7, 8, 258}


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_none_is_refused_by_name(tmp_path: Path, text: str) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(FailedPrecondition, match="generation_config"):
        Tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FailedPrecondition, match="tokenizer"):
        Tokenizer(tmp_path)


def without(folder: Path, *names: str, **config: Any) -> Path:
    """A tokenizer that has its vocabulary in vocab.json, with fields of its config, but without some of its files."""
    save_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "spiece.model").write_bytes(b"\n\x0c\n\x05<unk>\x15\0\0\0\0\x18\x02")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    for name in ("tokenizer.json", *names):
        (folder / name).unlink()
    return folder


HALVES = {
    "one file of two": (
        ["merges.txt", "spiece.model"],
        "GPT2Tokenizer",
        "has vocab.json, and neither merges.txt nor tokenizer.json",
    ),
    "the other one": (
        ["vocab.json", "spiece.model"],
        "GPT2Tokenizer",
        "has merges.txt, and neither vocab.json nor tokenizer.json",
    ),
    "a package for its class": (
        ["spiece.model"],
        "CpmAntTokenizer",
        "needs the package rjieba, which is not installed",
    ),
    "another package": ([], "M2M100Tokenizer", "needs the package sentencepiece, which is not installed"),
    "a package for its file": (
        ["vocab.json", "merges.txt"],
        "SiglipTokenizer",
        "needs the package sentencepiece, which is not installed",
    ),
    "a file that its class reads": (
        ["vocab.json", "merges.txt"],
        "LlamaTokenizer",
        "has no vocabulary that LlamaTokenizer reads, which is tokenizer.json or tokenizer.model",
    ),
}


@pytest.mark.parametrize(("missing", "name", "said"), HALVES.values(), ids=HALVES)
def test_half_a_tokenizer_is_refused_by_what_it_lacks(missing: list[str], name: str, said: str, tmp_path: Path) -> None:
    """What `transformers` says takes several lines, or names a package that would not help. Of the last it says
    nothing, and makes no tokens of any text. None of the packages comes with lorarep or its tests."""
    folder = without(tmp_path, *missing, tokenizer_class=name)
    with pytest.raises(FailedPrecondition) as error:
        Tokenizer(folder)
    assert str(error.value) == f"tokenizer: {folder} {said}"


def test_fits_is_about_the_largest_token(tokenizer: Tokenizer) -> None:
    assert fits(tokenizer, VOCAB)
    assert fits(tokenizer, 259)
    assert not fits(tokenizer, 258)
