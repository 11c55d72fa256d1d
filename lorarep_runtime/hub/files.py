"""Which files of a repository or folder are read, and whether they are all there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from mmap import mmap
from pathlib import Path
from typing import Literal

from lorarep_runtime.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound

Kind = Literal["base", "config", "adapter", "pickled"]
"""The part of a repository that is wanted: a base, a base's configuration without its weights, an adapter, or one whose
weights are pickled, which no server asks for."""

ADAPTERS: tuple[Kind, ...] = ("adapter", "pickled")
MAX_ELSEWHERE = 5
"""Most folders with an adapter that a message names."""
TEMPLATE_FILES = ("chat_template.json", "*.jinja")
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
    *TEMPLATE_FILES,
)
"""Shell patterns of the files of a tokenizer and its chat template."""
CONFIG: Mapping[Kind, str] = {
    "base": "config.json",
    "config": "config.json",
    "adapter": "adapter_config.json",
    "pickled": "adapter_config.json",
}
"""The configuration that each kind has to have."""
INDEX = "model.safetensors.index.json"
"""The list of a base's shards."""
WEIGHTS: Mapping[Kind, tuple[str, ...]] = {
    "base": ("model.safetensors", INDEX),
    "config": ("config.json",),
    "adapter": ("adapter_model.safetensors",),
    "pickled": ("adapter_model.bin",),
}
"""The files of which each kind has to have one."""
FILES: Mapping[Kind, tuple[str, ...]] = {
    "base": (CONFIG["base"], "generation_config.json", *WEIGHTS["base"], "model-*.safetensors", *TOKENIZER_FILES),
    "config": (CONFIG["config"], "generation_config.json"),
    "adapter": (CONFIG["adapter"], *WEIGHTS["adapter"], *TOKENIZER_FILES),
    "pickled": (CONFIG["pickled"], *WEIGHTS["pickled"], *TOKENIZER_FILES),
}
"""Shell patterns of the files that are downloaded of each kind."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLES = tuple(f"*{suffix}" for suffix in PICKLE_SUFFIXES)
"""Shell patterns of the files that are never downloaded."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of a pointer (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
DIGEST_BYTES = 4 << 20
"""Bytes of a file that are read and hashed at a time."""


@dataclass(frozen=True)
class Part:
    """The files of a kind in a repository: at its top, or in one of its folders."""

    kind: Kind
    subfolder: str = ""
    """Path of the folder in the repository, such as "adapters/checkpoint-430"; empty is the top."""

    def at(self, name: str) -> str:
        """Path in the repository of a file, or of the files that a shell pattern matches."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def source(self, repository: str) -> str:
        """The repository's id and the folder."""
        return f"{repository}/{self.subfolder}" if self.subfolder else repository

    @property
    def config(self) -> str:
        """Path of the configuration."""
        return self.at(CONFIG[self.kind])

    @property
    def weights(self) -> Sequence[str]:
        """Paths of the weights; one of them has to be there."""
        return [self.at(name) for name in WEIGHTS[self.kind]]

    @property
    def wanted(self) -> Sequence[str]:
        """Shell patterns of the files that are downloaded, if they are none of those `unwanted`."""
        return [self.at(pattern) for pattern in FILES[self.kind]]

    @property
    def unwanted(self) -> Sequence[str]:
        """Shell patterns of pickles, and of all that lies deeper."""
        return [self.at("*/*"), *(() if self.kind == "pickled" else PICKLES)]

    def wants(self, path: str) -> bool:
        """Whether a file of the repository is among those that are downloaded."""
        return _matches(path, self.wanted) and not _matches(path, self.unwanted)

    def is_of_tokenizer(self, path: str) -> bool:
        """Whether a file of the repository is of the tokenizer beside the configuration."""
        return _matches(path, [self.at(pattern) for pattern in TOKENIZER_FILES]) and not _matches(path, self.unwanted)

    def names(self, paths: Collection[str]) -> set[str]:
        """Names of those files of the repository that lie beside the configuration."""
        start = self.at("")
        return {path.removeprefix(start) for path in paths if path.startswith(start) and "/" not in path[len(start) :]}


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def file_digest(file: Path | int) -> str:
    """SHA-256 of a file, or of what an open descriptor has yet to read, in hexadecimal. Raises OSError."""
    # Not `hashlib.file_digest`, which reads 256 KiB at a time and takes Python's lock from others after each. Nor a
    # bytearray, which keeps that lock for some milliseconds while it is filled with zeros.
    digest = hashlib.sha256()
    with (
        open(file, "rb", buffering=0, closefd=not isinstance(file, int)) as opened,
        mmap(-1, DIGEST_BYTES) as pages,
        memoryview(pages) as buffer,
    ):
        while size := opened.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def check_links(folder: Path) -> None:
    """Checks that no symbolic link leads out of a folder. In the Hub cache, links may lead to the repository's blobs.

    Raises:
        InvalidArgument: a link does, named by its path in the folder.
    """
    cached = (
        above for above in folder.parents if above.name == "snapshots" and above.parent.name.startswith("models--")
    )
    snapshots = next(cached, None)
    inside = folder if snapshots is None else snapshots.parent
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise InvalidArgument(
                    "a symbolic link that leads out of the folder", field=str(path.relative_to(folder))
                )


def check_files(names: Collection[str], kind: Kind, source: str) -> None:
    """Checks that a source has weights and a configuration of its kind.

    Args:
        names: its files, without those in subfolders.
        kind: the part that is wanted.
        source: repository or folder, for messages.

    Raises:
        FailedPrecondition: the weights are pickled; or a base has an adapter beside them.
        NotFound: weights or configuration are missing.
    """
    if not any(name in names for name in WEIGHTS[kind]):
        if kind == "pickled" and any(name in names for name in WEIGHTS["adapter"]):
            raise FailedPrecondition(f"{source}: has safetensors, which need no conversion")
        if kind == "adapter" and any(name in names for name in WEIGHTS["pickled"]):
            raise FailedPrecondition(
                f"{source}: {WEIGHTS['pickled'][0]} is a pickle, which is never opened here; "
                f"`lorarep convert {source} OUT` writes it as safetensors"
            )
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise FailedPrecondition(f"{source}: {pickles[0]} is a pickle, which is never opened; use safetensors")
        raise NotFound(f"{source}: has no {WEIGHTS[kind][0]}")
    if CONFIG[kind] not in names:
        raise NotFound(f"{source}: has no {CONFIG[kind]}")
    if kind == "base" and CONFIG["adapter"] in names:
        # transformers would load it with the base, where PEFT is installed.
        raise FailedPrecondition(
            f"{source}: is beside the weights of a base, which are served without an adapter in them alone",
            field=CONFIG["adapter"],
        )


def check_listed(paths: Collection[str], part: Part, repository: str, allowed: Sequence[str] = ("*",)) -> None:
    """Checks that the files that the Hub lists of a commit have weights and a configuration of a part.

    Args:
        paths: in the repository.
        part: that is wanted.
        repository: its id.
        allowed: patterns, as for `permits`, of the folders of which the error may speak.

    Raises:
        FailedPrecondition: as `check_files`.
        NotFound: weights or configuration are missing; it says which folders have an adapter.
    """
    try:
        check_files(part.names(paths), part.kind, part.source(repository))
    except NotFound as error:
        end = f"/{CONFIG[part.kind]}"
        folders = sorted(path.removesuffix(end) for path in paths if path.endswith(end))
        found = [f"{repository}/{folder}" for folder in folders if any(permits(p, repository, folder) for p in allowed)]
        if part.kind not in ADAPTERS or not found:
            raise
        raise NotFound(f"{error.message}; these have one: {', '.join(found[:MAX_ELSEWHERE])}") from error


def permits(pattern: str, repository: str, subfolder: str) -> bool:
    """Whether a pattern of the allow-list, as `hub.snapshot.check_allowed` describes them, permits a folder."""
    organization, _, rest = pattern.partition("/")
    name, slash, folders = rest.partition("/")
    if not slash:
        return fnmatchcase(repository, pattern)
    return fnmatchcase(repository, f"{organization}/{name}") and fnmatchcase(subfolder, folders)


def check_pointers(folder: Path, kind: Kind) -> None:
    """Checks that no file of a kind is a pointer of Git LFS in place of its content.

    Raises:
        FailedPrecondition: naming a file that is one.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in FILES[kind]):
            with path.open("rb") as file:
                is_pointer = file.read(len(POINTER)) == POINTER
            if is_pointer:
                raise FailedPrecondition(
                    "is a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned", field=path.name
                )


def missing_shards(folder: Path) -> Sequence[str]:
    """The shards that are missing in a base's folder, if it has an index and no single file of weights.

    Raises:
        DataLoss: the index is malformed.
    """
    index = folder / INDEX
    if not index.exists() or (folder / WEIGHTS["base"][0]).exists():
        return []
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        return sorted(shard for shard in shards if not (folder / shard).is_file())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataLoss("not an index of safetensors", field=INDEX) from error


def check_shards(folder: Path) -> None:
    """Checks that a base's folder holds all shards of its index.

    Raises:
        DataLoss: a shard is missing, or the index is malformed.
    """
    if missing := missing_shards(folder):
        raise DataLoss(f"names {missing[0]}, which is not there", field=INDEX)
