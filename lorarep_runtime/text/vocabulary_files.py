"""The files that a tokenizer's vocabulary comes from: whether they are there, and what is missing otherwise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lorarep_runtime.errors import FailedPrecondition, first_line

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILES = (TOKENIZER_FILE, "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt")
"""Shell patterns of the files that hold a vocabulary."""
_PACKAGE = re.compile(r"requires? the ([\w-]+) library|install ([\w-]+) to use|`([\w-]+)` is required")
"""How `transformers` says that a package is not installed."""
_SENTENCEPIECE = b"\n"
"""The first byte of SentencePiece's models; tiktoken's files of the same name begin with base64."""
_PAIRS = (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json"))


def check_there(folder: Path) -> None:
    """Checks that a folder has a vocabulary of any kind. Raises FailedPrecondition.

    `transformers` would make a tokenizer of three tokens.
    """
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES):
        raise FailedPrecondition(
            f"{folder} has no vocabulary, which is one of {', '.join(VOCABULARY_FILES)}", field="tokenizer"
        )


def check_read(folder: Path, tokenizer: Any) -> None:
    """Checks that the vocabulary of a folder is in the tokenizer that `transformers` has made of it.

    Its classes have file names of their own, and make a tokenizer of special tokens alone where these are missing.

    Raises:
        FailedPrecondition: naming the class and its files.
    """
    if (folder / TOKENIZER_FILE).exists():
        return
    tokens = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens)
    if len(tokens) <= 1:  # some have a space
        names = sorted({TOKENIZER_FILE, *type(tokenizer).vocab_files_names.values()})
        raise FailedPrecondition(
            f"{folder} has no vocabulary that {type(tokenizer).__name__} reads, which is {' or '.join(names)}",
            field="tokenizer",
        )


def what_is_missing(folder: Path, error: BaseException) -> str:
    """One line that says why `transformers` could not load a folder's tokenizer.

    Args:
        folder: holds the tokenizer's files.
        error: of `transformers`, which may take several lines, or name a package that would not help.
    """
    if found := _PACKAGE.search(" ".join(str(error).split())):
        package = next(filter(None, found.groups())).lower()
        if package == "tiktoken" and any(_begins_as_sentencepiece(file) for file in folder.glob("*.model")):
            package = "sentencepiece"
        return f"needs the package {package}, which is not installed"
    if not (folder / TOKENIZER_FILE).exists():
        for one, other in _PAIRS:
            if (folder / one).exists() and not (folder / other).exists():
                return f"has {one}, and neither {other} nor {TOKENIZER_FILE}"
    return f"cannot be loaded by transformers: {first_line(error)}"


def _begins_as_sentencepiece(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(1) == _SENTENCEPIECE
