"""Which files of a repository are read, and how they are checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from mmap import mmap
from pathlib import Path
from typing import Literal

from lorarep_runtime.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)

Kind = Literal["base", "config", "adapter"]
"""What is wanted of a repository: a base, a base's configuration without its weights, an adapter."""


DIGEST_BYTES = 4 << 20
"""Of a file that are hashed at a time."""


LOCAL = "local"
"""The commit of a folder."""


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.json",
    "*.jinja",
)


CONFIG: Mapping[Kind, str] = {"base": "config.json", "config": "config.json", "adapter": "adapter_config.json"}


INDEX = "model.safetensors.index.json"


WEIGHTS: Mapping[Kind, tuple[str, ...]] = {
    "base": ("model.safetensors", INDEX),
    "config": ("config.json",),
    "adapter": ("adapter_model.safetensors",),
}
"""One of these has to be there."""


FILES: Mapping[Kind, tuple[str, ...]] = {
    "base": (CONFIG["base"], "generation_config.json", *WEIGHTS["base"], "model-*.safetensors", *TOKENIZER_FILES),
    "config": (CONFIG["config"], "generation_config.json"),
    "adapter": (CONFIG["adapter"], *WEIGHTS["adapter"], *TOKENIZER_FILES),
}
"""Shell patterns of what is downloaded, from the top of a repository alone."""


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    # Not `hashlib.file_digest`: that reads 256 KiB at a time, and takes the interpreter from others after each. Nor a
    # bytearray, which is filled with zeros, for some milliseconds, before it lets go of the interpreter.
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file, mmap(-1, DIGEST_BYTES) as pages, memoryview(pages) as buffer:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def check_links(folder: Path) -> None:
    in_cache = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    inside = folder.parents[2] if in_cache else folder  # the Hub cache links its snapshots' files to its blobs
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise InvalidArgument(
                    "a symbolic link that leads out of the folder", field=str(path.relative_to(folder))
                )


def check_files(names: Collection[str], kind: Kind, source: str) -> None:
    if not any(name in names for name in WEIGHTS[kind]):
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise FailedPrecondition(f"{source}: {pickles[0]} is a pickle, which is never opened; use safetensors")
        raise NotFound(f"{source}: has no {WEIGHTS[kind][0]}")
    if CONFIG[kind] not in names:
        raise NotFound(f"{source}: has no {CONFIG[kind]}")


def check_shards(folder: Path) -> None:
    index = folder / INDEX
    if not index.exists() or (folder / WEIGHTS["base"][0]).exists():
        return
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataLoss("not an index of safetensors", field=INDEX) from error
    if missing:
        raise DataLoss(f"names {missing[0]}, which is not there", field=INDEX)
