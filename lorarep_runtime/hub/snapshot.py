"""From a Hub repository or a folder to a verified local snapshot.

`huggingface_hub` downloads and keeps its usual cache, so what `hf download` fetched is found. It continues a download
whose connection broke with a Range request; after a restart it keeps the files that were complete. `HF_ENDPOINT`,
`HF_TOKEN` and `HF_HUB_DOWNLOAD_TIMEOUT` (seconds without data; default 10) mean what they mean there.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import RepoFile, constants, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in an __all__

from lorarep_runtime.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable
from lorarep_runtime.hub.bounds import Bounds
from lorarep_runtime.hub.cache import check_contents, known_blobs, remove_abandoned_parts
from lorarep_runtime.hub.client import download
from lorarep_runtime.hub.files import (
    ADAPTERS,
    CONFIG,
    Kind,
    Part,
    check_files,
    check_links,
    check_listed,
    check_pointers,
    check_shards,
    permits,
)
from lorarep_runtime.hub.look import Look
from lorarep_runtime.progress import Progress

log = logging.getLogger(__name__)

LOCAL = "local"
"""The commit of a folder's snapshot."""
_REVISION = re.compile(r"[^\s~^:?*\[\\\x00-\x1f\x7f/.][^\s~^:?*\[\\\x00-\x1f\x7f]{0,254}")  # git-check-ref-format

_FOLDER = re.compile(r"[\w.-](?:[\w .,+=~()-]{0,126}[\w.,+=~()-])?")
"""A part of the path of a folder: no character that means something in a shell pattern."""
MAX_SUBFOLDER = 200
"""Most characters of a folder's path in its repository."""


@dataclass(frozen=True)
class Snapshot:
    """A repository, or one of its folders, at one commit, or a folder of this machine."""

    folder: Path
    """Holds all files of its kind that there are."""
    repository: str
    """Repository id, or the folder's absolute path."""
    commit: str
    """40 hexadecimal digits, or `LOCAL`."""
    subfolder: str = ""
    """Path of the folder in the repository; empty is its top."""

    @property
    def source(self) -> str:
        """By what `fetch` finds it again, at its commit."""
        return Part("adapter", self.subfolder).source(self.repository)

    @property
    def cached(self) -> Path:
        """The folder of the repository in the Hub cache, which holds `blobs`. Of none if it is `LOCAL`."""
        return self.folder.parents[1 + len(Path(self.subfolder).parts)]


def fetch(
    source: str,
    revision: str | None,
    *,
    kind: Kind,
    cache_dir: Path | None,
    progress: Progress | None = None,
    bounds: Bounds | None = None,
    look: Look | None = None,
) -> Snapshot:
    """Finds or downloads the configuration, tokenizer and safetensors of a base or an adapter.

    Args:
        source: repository id, for an adapter also followed by a folder of the repository ("org/name/checkpoint-430");
            or a folder of this machine: an absolute path or one that starts with `.` or `~`; for a base, as in
            `transformers`, any folder that exists.
        revision: branch, tag or commit, resolved once; None is the default branch. A commit that is in the cache is
            served without asking the Hub.
        kind: the part of the repository that is wanted.
        cache_dir: Hub cache; None is huggingface_hub's default.
        progress: told of bytes downloaded, as stage "download".
        bounds: on an adapter that no operator has named; a pull request is refused then.
        look: at an adapter before its weights come. What it raises ends the fetch.

    Raises:
        InvalidArgument: the source or revision is malformed, or a link leads out of an adapter's folder.
        NotFound: no such folder; or the Hub knows no such repository, revision or file.
        PermissionDenied: the Hub refuses access, or the revision is of a pull request.
        FailedPrecondition: the weights are pickled, or a file is over its bound; neither is downloaded nor opened. Or a
            file is a pointer of Git LFS, or an adapter lies beside a base.
        DataLoss: shards of a base are missing, or what came is not what the Hub lists; the cache does not keep that.
        Exhausted: the disk is full.
        Unavailable: the Hub did not answer properly, and the cache does not hold all files, or may not. With
            HF_HUB_OFFLINE it is enough that it holds config and weights.
    """
    is_path = os.path.isabs(source) or source.startswith((".", "~"))
    if is_path or (kind not in ADAPTERS and source and os.path.isdir(source)):
        return _local(source, revision, kind, look)
    repository, subfolder = split_source(source) if kind in ADAPTERS else (source, "")
    _check_repository(repository)
    part = Part(kind, subfolder)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidArgument(f"{revision!r} is not the name of a branch, tag or commit", field="revision")
    remove_abandoned_parts(repository, cache_dir)
    known = known_blobs(repository, cache_dir)
    whole = download(repository, revision, part, cache_dir, progress, bounds, look)
    folder, tree = whole / subfolder, _listed(repository, whole.name, cache_dir)
    if tree is None:
        check_files(_file_names(folder), kind, f"the cache of {source}")
    else:
        check_listed({file.path for file in tree}, part, repository, ("*",) if bounds is None else bounds.allowed)
        check_contents(whole, tree, known)
    check_pointers(folder, kind)
    if kind == "base":
        check_shards(folder)
    return Snapshot(folder, repository, whole.name, subfolder)


def _file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()


def _listed(repository: str, commit: str, cache_dir: Path | None) -> Sequence[RepoFile] | None:
    """The files that the Hub has listed of a commit. None without a list, if the cache is to be taken as it is.

    Without a list nobody can tell a whole snapshot from a partial one. It is missing where `transformers` or PEFT have
    asked for each file, or a client before 1.24 for all.

    Raises:
        Unavailable: there is no list, and the Hub could have been asked for it.
    """
    try:
        return get_cached_repo_tree(repository, revision=commit, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError as error:
        if not constants.HF_HUB_OFFLINE:
            raise Unavailable(
                f"{repository}: the hub cannot be reached, and the cache may hold only part of it; "
                "with HF_HUB_OFFLINE=1 that is taken for all"
            ) from error
        _warn_once(repository, commit)
        return None


@lru_cache(1024)
def _warn_once(repository: str, commit: str) -> None:
    log.warning("%s at %s: what the cache holds is taken for all; no list there says which it has", repository, commit)


def split_source(source: str) -> tuple[str, str]:
    """The repository of an adapter's source, and the folder there, which is empty for its top.

    Raises:
        InvalidArgument: the folder has parts such as "..", or characters that stand for others.
    """
    organization, _, rest = source.partition("/")
    name, slash, subfolder = rest.partition("/")
    if not slash:
        return source, ""
    parts = subfolder.split("/")
    if len(subfolder) > MAX_SUBFOLDER or not all(_FOLDER.fullmatch(part) and part.strip(".") for part in parts):
        raise InvalidArgument(
            f"{source!r} is neither a repository id such as 'org/name' nor one with a folder in it", field="repository"
        )
    return f"{organization}/{name}", subfolder


def repository_of(source: str) -> str:
    """The repository of any source that is one, in whatever folder there; the source may be malformed."""
    return "/".join(source.split("/", 2)[:2])


def check_allowed(source: str, patterns: Sequence[str]) -> None:
    """Checks that a caller may name an adapter's repository, or a folder in it, without any request to the Hub.

    Args:
        source: "organization/repository" or "organization/repository/folder".
        patterns: shell patterns of repositories, whose folders they permit as well; of one with two slashes or more,
            what follows the second is for the folder. `*` also stands for slashes. None permits none.

    Raises:
        InvalidArgument: not a repository id, or no path of a folder.
        PermissionDenied: no pattern matches.
    """
    repository, subfolder = split_source(source)
    _check_repository(repository)
    if not any(permits(pattern, repository, subfolder) for pattern in patterns):
        raise PermissionDenied(f"{source!r} is not on the allow-list", field="repository")


def _check_repository(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InvalidArgument(
            f"{repository!r} is not a repository id such as 'org/name'", field="repository"
        ) from error


def _local(source: str, revision: str | None, kind: Kind, look: Look | None) -> Snapshot:
    """The snapshot of a folder, which stays where it is."""
    if revision is not None:
        raise InvalidArgument(f"{revision!r}, but {source!r} is a folder", field="revision")
    folder = Path(os.path.realpath(os.path.expanduser(source)))
    if not folder.is_dir():
        raise NotFound(f"{source}: no such folder")
    if kind in ADAPTERS:
        check_links(folder)
        if look is not None and (folder / CONFIG[kind]).is_file():
            check_pointers(folder, kind)
            look.config(folder)  # its reasons go before those of the weights
    check_files(_file_names(folder), kind, source)
    check_pointers(folder, kind)
    if kind == "base":
        check_shards(folder)
    return Snapshot(folder, str(folder), LOCAL)
