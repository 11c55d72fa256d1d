"""What of a foreign tokenizer may compute: nothing that the base's own does not."""

from __future__ import annotations

import filecmp
import hashlib
import json
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorarep_runtime.errors import FailedPrecondition, LorarepError, first_line
from lorarep_runtime.text.vocabulary_files import TOKENIZER_FILE, VOCABULARY_FILES

COMPONENTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
"""Parts of a tokenizer.json that compute with text. A few bytes of them may ask for any time and memory."""
MAX_CONFIG_BYTES = 4 << 20
"""Largest of an adapter's tokenizer configs: those with thousands of added tokens have about 1 MiB."""
MAX_ADDED_TOKENS = 1024
"""Most tokens that an adapter adds to the base's vocabulary."""
MAX_TOKEN_CHARACTERS = 1024
"""Longest token that an adapter adds."""


@contextmanager
def foreign_code(
    what: str | Callable[[BaseException], str],
    kind: type[LorarepError] = FailedPrecondition,
    field: str = "tokenizer",
) -> Iterator[None]:
    """Turns whatever a foreign file makes a library raise into an error. A panic of one in Rust is no Exception.

    Args:
        what: has failed, before the error's first line in the message; or makes the message of the error.
        kind: class of the error.
        field: of the error.
    """
    try:
        yield
    except (LorarepError, KeyboardInterrupt, SystemExit, CancelledError):
        raise
    except BaseException as error:
        message = f"{what}: {first_line(error)}" if isinstance(what, str) else what(error)
        raise kind(message, field=field) from error


class Pipeline:
    """The parts of a base's tokenizer that compute, for comparison with an adapter's.

    Args:
        folder: holds the base's files.
        serialized: its tokenizer.json as the library writes it; None where it has no such form.
    """

    def __init__(self, folder: Path, serialized: str | None) -> None:
        self._folder = folder
        file = folder / TOKENIZER_FILE
        texts = [serialized, file.read_text(encoding="utf-8") if file.exists() else None]
        documents = [json.loads(text) for text in texts if text is not None]
        self._most_bytes = 4 * max((len(text) for text in texts if text), default=0) + MAX_CONFIG_BYTES
        """Files of the same contents differ by their spaces and the form of their merges."""
        self._models = {_model_digest(document) for document in documents}
        self._components = [{part: document.get(part) for part in COMPONENTS} for document in documents]

    def check(self, folder: Path) -> None:
        """Checks that an adapter's tokenizer computes what the base's does. Special tokens and templates may differ.

        Raises:
            FailedPrecondition: naming the file, or the part of its tokenizer.json, that is another.
        """
        for file in folder.glob("*.json"):
            if file.name != TOKENIZER_FILE and file.stat().st_size > MAX_CONFIG_BYTES:
                raise FailedPrecondition(f"over {MAX_CONFIG_BYTES} bytes", field=file.name)
        own = folder / TOKENIZER_FILE
        if not own.exists():
            for file in (file for pattern in VOCABULARY_FILES for file in folder.glob(pattern)):
                if not self._is_bases(file):
                    raise _differs(file.name, "is another than the base's")
        elif not self._is_bases(own):
            self._check_document(own)

    def _is_bases(self, file: Path) -> bool:
        base = self._folder / file.name
        return base.exists() and filecmp.cmp(base, file, shallow=False)

    def _check_document(self, file: Path) -> None:
        if file.stat().st_size > self._most_bytes:
            raise FailedPrecondition(f"over {self._most_bytes} bytes", field=TOKENIZER_FILE)
        with foreign_code("cannot be read", field=TOKENIZER_FILE):
            document = json.loads(file.read_bytes())
            components = {part: document.get(part) for part in COMPONENTS}
            model = _model_digest(document)
        if model not in self._models:
            raise _differs(TOKENIZER_FILE, "its model is another than the base's")
        for part in COMPONENTS:
            if not any(_is_same(part, components[part], base[part]) for base in self._components):
                raise _differs(TOKENIZER_FILE, f"its {part} is another than the base's")


def _differs(field: str, message: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{message}, as only adapters may have that the operator names (--adapter, --adapters-file)", field=field
    )


def _model_digest(document: Mapping[str, Any]) -> str:
    """A digest of the model, whichever version of `tokenizers` has written it."""
    model = {key: value for key, value in document["model"].items() if value not in (None, "") and value is not False}
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def _is_same(part: str, own: Any, base: Any) -> bool:
    """Whether two forms of a part are the same to the library, which adds what older versions did not write."""
    if own == base:
        return True
    # Making the part must be safe: an expression's size has little to do with the memory that it takes.
    if not own or not base or not _texts(own) <= _texts(base):
        return False
    with foreign_code(f"its {part} cannot be made", field=TOKENIZER_FILE):
        return _as_written_now(part, own) == _as_written_now(part, base)


def _texts(value: Any) -> set[str]:
    """All strings in a JSON value, without the keys."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return {text for item in value for text in _texts(item)}
    return {value} if isinstance(value, str) else set()


def _as_written_now(part: str, value: Any) -> Any:
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    empty: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "model": model}
    document = {**empty, **dict.fromkeys(COMPONENTS), part: value}
    return json.loads(Tokenizer.from_str(json.dumps(document)).to_str())[part]
