"""Tokenizers that anybody may have written: they compute what the base's does, or are refused by name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.errors import FailedPrecondition, LorarepError
from lorarep_runtime.hub.files import TOKENIZER_FILES
from lorarep_runtime.text import foreign
from lorarep_runtime.text.tokenizer import Tokenizer
from lorarep_runtime.text.vocabulary_files import VOCABULARY_FILES
from tests.support.engines import engine_for
from tests.support.hub_faults import FaultyHub
from tests.support.models import VOCAB, save_adapter, save_base, save_tokenizer

TEN_TIMES = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BOMB = {"type": "Sequence", "decoders": [BYTES, {"type": "Fuse"}, *[TEN_TIMES] * 6]}
PANIC = {"type": "FixedLength", "length": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("base")
    save_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture
def own(base: Tokenizer, tmp_path: Path) -> Path:
    """An adapter's folder, with the base's tokenizer."""
    return Path(shutil.copytree(base._folder, tmp_path / "own"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))


def adapters_own(base: Tokenizer, folder: Path, trusted: bool = False) -> Tokenizer:
    return base.adapters_own(folder, VOCAB, trusted=trusted)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("decoder", BOMB),
        ("decoder", None),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "((a{1000}){1000}){1000}"}, "content": "b"}),
        ("pre_tokenizer", PANIC),
        ("post_processor", {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}),
    ],
)
def test_an_untrusted_tokenizer_that_computes_otherwise_is_refused_by_its_part(
    base: Tokenizer, own: Path, part: str, value: object
) -> None:
    edit(own, lambda document: document.update({part: value}))
    began = time.monotonic()
    with pytest.raises(FailedPrecondition, match=f"its {part} is another than the base's"):
        adapters_own(base, own)
    assert time.monotonic() - began < 1


def test_an_untrusted_tokenizer_with_another_vocabulary_is_refused(base: Tokenizer, own: Path) -> None:
    edit(own, lambda document: document["model"]["vocab"].update({"b" * 10_000: 259}))
    with pytest.raises(FailedPrecondition, match="its model is another"):
        adapters_own(base, own)
    assert adapters_own(base, own, trusted=True).pieces([259]) == ["b" * 10_000]


def test_an_untrusted_tokenizer_as_another_version_has_written_it_is_used(base: Tokenizer, own: Path) -> None:
    def as_before(document: dict[str, Any]) -> None:
        del document["pre_tokenizer"]["use_regex"], document["model"]["ignore_merges"], document["model"]["dropout"]

    edit(own, as_before)
    assert adapters_own(base, own).encode("ab c") == base.encode("ab c")


def test_an_untrusted_tokenizer_may_have_other_special_tokens_and_its_own_template(base: Tokenizer, own: Path) -> None:
    added = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    edit(own, lambda document: document["added_tokens"].append({"id": 259, "content": "<|end|>", **added}))
    edit(
        own,
        lambda config: config.update(eos_token="<|end|>", chat_template="{{ messages[0].content }}<|end|>"),
        "tokenizer_config.json",
    )
    tokenizer = adapters_own(base, own)
    assert tokenizer.eos_ids == {259}
    assert tokenizer.chat([{"role": "user", "content": "a"}]) == [*base.encode("a"), 259]


def test_a_token_past_the_bases_rows_leaves_the_tokenizer_in_use(base: Tokenizer, own: Path) -> None:
    added = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    edit(own, lambda document: document["added_tokens"].append({"id": 259, "content": "[PAD]", **added}))
    for trusted in (False, True):
        tokenizer = base.adapters_own(own, 259, trusted=trusted)
        assert tokenizer.encode("a[PAD]") == [*base.encode("a"), 259]


@pytest.mark.parametrize("trusted", [False, True])
def test_a_token_past_the_bases_rows_and_a_template_are_the_adapters_own(
    base: Tokenizer, own: Path, trusted: bool
) -> None:
    """As whoever runs it under PEFT makes tokens of a chat: with the tokenizer of the adapter's folder."""
    added = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    edit(own, lambda document: document["added_tokens"].append({"id": 259, "content": "<|end|>", **added}))
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}|{{ m.content }}<|end|>{% endfor %}"
    edit(own, lambda config: config.update(chat_template=template, eos_token="<|end|>"), "tokenizer_config.json")
    chat = [{"role": "user", "content": "a <|end|> é"}]
    theirs = AutoTokenizer.from_pretrained(own)
    tokens = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert 259 in tokens
    assert base.with_chat_template("{{ 1 }}").adapters_own(own, 259, trusted=trusted).chat(chat) == tokens


@pytest.mark.parametrize(
    ("count", "length"), [(foreign.MAX_ADDED_TOKENS + 1, 9), (1, foreign.MAX_TOKEN_CHARACTERS + 1)]
)
def test_added_tokens_are_bounded_in_number_and_length(base: Tokenizer, own: Path, count: int, length: int) -> None:
    added = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    more = [{"id": 259 + i, "content": f"{i:a>{length}}", **added} for i in range(count)]
    edit(own, lambda document: document["added_tokens"].extend(more))
    with pytest.raises(FailedPrecondition, match=f"adds {count} tokens, the longest of {length}"):
        adapters_own(base, own)


def test_files_are_bounded_before_they_are_read(base: Tokenizer, own: Path) -> None:
    (own / "special_tokens_map.json").write_text(" " * (foreign.MAX_CONFIG_BYTES + 1))
    with pytest.raises(FailedPrecondition, match=r"special_tokens_map\.json: over"):
        adapters_own(base, own)
    (own / "special_tokens_map.json").unlink()
    with (own / "tokenizer.json").open("a") as file:
        file.write(" " * 2 * foreign.MAX_CONFIG_BYTES)
    with pytest.raises(FailedPrecondition, match=r"tokenizer\.json: over"):
        adapters_own(base, own)


def test_a_tokenizer_without_a_vocabulary_is_refused(base: Tokenizer, own: Path) -> None:
    """`transformers` makes one of three tokens, which turns every text into the same one."""
    (own / "tokenizer.json").unlink()
    edit(own, lambda config: config.update(tokenizer_class="LlamaTokenizer"), "tokenizer_config.json")
    for trusted in (False, True):
        with pytest.raises(FailedPrecondition, match="has no vocabulary"):
            adapters_own(base, own, trusted)


def test_a_vocabulary_is_in_files_that_are_downloaded(base: Tokenizer, own: Path) -> None:
    """A folder is served or refused as the repository that holds the same files."""
    assert set(VOCABULARY_FILES) < set(TOKENIZER_FILES)
    (own / "tokenizer.json").rename(own / "tekken.json")
    with pytest.raises(FailedPrecondition, match=r"has no vocabulary, which is one of tokenizer\.json"):
        adapters_own(base, own, trusted=True)


def test_a_vocabulary_in_other_files_is_the_bases(base: Tokenizer, own: Path) -> None:
    (own / "tokenizer.json").unlink()
    (own / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(FailedPrecondition, match=r"vocab\.json: is another"):
        adapters_own(base, own)


@pytest.mark.parametrize("call", ["encode", "spans", "chat"])
def test_a_panic_of_the_library_is_an_error(base: Tokenizer, own: Path, call: str) -> None:
    edit(own, lambda document: document.update(pre_tokenizer=PANIC))
    edit(own, lambda config: config.update(chat_template="{{ messages[0].content }}"), "tokenizer_config.json")
    argument: Any = [{"role": "user", "content": "a"}] if call == "chat" else "a"
    with pytest.raises(FailedPrecondition, match="tokenizer: "):
        getattr(adapters_own(base, own, trusted=True), call)(argument)


def test_whatever_a_tokenizer_raises_is_an_error(base: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException): ...

    class Broken:
        is_fast = True
        chat_template = "{{ 1 }}"

        def __getattr__(self, name: str) -> Any:
            raise Panic(name)

        def __call__(self, *args: object, **options: object) -> None:
            raise Panic

    tokenizer = base.with_chat_template("{{ 1 }}")
    monkeypatch.setattr(tokenizer, "_tokenizer", Broken())
    calls: list[Callable[[], object]] = [
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.encode("a", 1),
        lambda: tokenizer.spans("a"),
        lambda: tokenizer.pieces([1]),
        lambda: tokenizer.chat([]),
        lambda: tokenizer.decode([1]),
        lambda: tokenizer.token_text(1),
    ]
    for call in calls:
        with pytest.raises(LorarepError):
            call()


def test_an_adapter_that_no_operator_named_cannot_slow_the_steps(
    tmp_path: Path, hub: FaultyHub, base: Tokenizer
) -> None:
    """Seven kilobytes of a decoder would take seconds of the step thread for each token."""
    model = save_base("llama", tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "bomb", r=2, target_modules=["q_proj"])
    shutil.copytree(model, adapter, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    hub.publish("org/good", adapter)
    edit(adapter, lambda document: document.update(decoder=BOMB))
    hub.publish("org/bomb", adapter)
    engine = engine_for(model, limits=AdapterLimits(allow_repositories=("org/*",)), cache_dir=tmp_path / "cache")
    engine.adapters.lease([("org/good", 1.0)]).release()
    for load in (lambda: engine.adapters.lease([("org/bomb", 1.0)]), lambda: engine.adapters.load("x", "org/bomb")):
        with pytest.raises(FailedPrecondition, match="its decoder"):
            load()
    assert [info.name for info in engine.adapters.list()] == ["org/good"]
    engine.adapters.load("x", "org/bomb", trusted=True)
