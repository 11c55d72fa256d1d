"""From a Hub repository or a folder to a verified local snapshot. Nothing else here talks to the Hub.

`huggingface_hub` does the talking and keeps its usual cache, so what `hf download` fetched is found. It continues a
download whose connection broke with a Range request; after a restart it keeps the files that were complete.
`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_DOWNLOAD_TIMEOUT` (seconds without data; default 10) mean what they mean there.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoFile, constants, get_cached_repo_tree
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from lorarep_runtime.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from lorarep_runtime.hub.client import AGENT, reporting_bar, translated
from lorarep_runtime.hub.files import (
    FILES,
    LOCAL,
    PICKLE_SUFFIXES,
    Kind,
    check_files,
    check_links,
    check_shards,
    file_digest,
)
from lorarep_runtime.progress import Progress

ABANDONED = 3600.0
"""Seconds for which nobody has written a part of a download that nobody is still at."""


_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever this huggingface_hub uses
_REVISION = re.compile(r"[^\s~^:?*\[\\\x00-\x1f\x7f/.][^\s~^:?*\[\\\x00-\x1f\x7f]{0,254}")  # git-check-ref-format


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, or a folder, on this machine."""

    folder: Path
    """Holds all files of its kind that the repository has."""
    repository: str
    """Repository id, or the folder's absolute path."""
    commit: str
    """40 hexadecimal digits, or `LOCAL`."""


def fetch(
    source: str, revision: str | None, *, kind: Kind, cache_dir: Path | None, progress: Progress | None = None
) -> Snapshot:
    """Finds or downloads the configuration, tokenizer and safetensors of a base or an adapter.

    Args:
        source: repository id, or a folder: an absolute path or one that starts with `.` or `~`; for a base, as in
            `transformers`, any folder that exists.
        revision: branch, tag or commit, resolved once; None is the default branch. A commit that is in the cache is
            served without asking the Hub.
        cache_dir: Hub cache; None is huggingface_hub's default.
        progress: told of bytes downloaded, as stage "download".

    Raises:
        InvalidArgument: the source or revision is malformed, or a link leads out of an adapter's folder.
        NotFound: no such folder; or the Hub knows no such repository, revision or file.
        PermissionDenied: the Hub refuses access.
        FailedPrecondition: the weights are pickled; they are neither downloaded nor opened.
        DataLoss: shards of a base are missing, or what came is not what the Hub lists; the cache does not keep that.
        Exhausted: the disk is full.
        Unavailable: the Hub did not answer properly, and the cache does not hold all files.
    """
    if (
        os.path.isabs(source)
        or source.startswith((".", "~"))
        or (kind != "adapter" and source and os.path.isdir(source))
    ):
        return _local(source, revision, kind)
    _check_repository(source)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidArgument(f"{revision!r} is not the name of a branch, tag or commit", field="revision")
    known = _blobs(source, cache_dir)
    folder = _download(source, revision, kind, cache_dir, progress)
    try:
        tree = get_cached_repo_tree(source, revision=folder.name, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError as error:
        # Without the listing nobody can tell a whole snapshot from a partial one.
        raise Unavailable(f"{source}: the hub cannot be reached, and the cache may hold only part of it") from error
    check_files({file.path for file in tree}, kind, source)
    _check_contents(folder, tree, known)
    if kind == "base":
        check_shards(folder)
    return Snapshot(folder, source, folder.name)


def check_allowed(repository: str, patterns: Sequence[str]) -> None:
    """Whether a caller may name a repository; asks nobody.

    Args:
        patterns: shell patterns, in which `*` also stands for a slash; none allows none.

    Raises:
        InvalidArgument: not a repository id.
        PermissionDenied: no pattern matches.
    """
    _check_repository(repository)
    if not any(fnmatchcase(repository, pattern) for pattern in patterns):
        raise PermissionDenied(f"{repository!r} is not on the allow-list", field="repository")


def _check_repository(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InvalidArgument(
            f"{repository!r} is not a repository id such as 'org/name'", field="repository"
        ) from error


def _local(source: str, revision: str | None, kind: Kind) -> Snapshot:
    if revision is not None:
        raise InvalidArgument(f"{revision!r}, but {source!r} is a folder", field="revision")
    folder = Path(os.path.realpath(os.path.expanduser(source)))
    if not folder.is_dir():
        raise NotFound(f"{source}: no such folder")
    if kind == "adapter":
        check_links(folder)
    check_files({path.name for path in folder.iterdir() if path.is_file()}, kind, source)
    if kind == "base":
        check_shards(folder)
    return Snapshot(folder, str(folder), LOCAL)


def _blobs(repository: str, cache_dir: Path | None) -> set[str]:
    """Names of the contents that the cache holds of a repository. Parts that killed processes have left go: the client
    never takes up another's."""
    folder = Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"), "blobs")
    for part in folder.glob("*.incomplete"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
    return {path.name for path in folder.glob("*")}


def _check_contents(folder: Path, tree: Sequence[RepoFile], known: Collection[str]) -> None:
    """Takes out of the cache again what came and is not what the Hub lists. The client compares sizes alone, and those
    with what the same answer claims."""
    lost = [file.path for file in tree if (folder / file.path).exists() and not _is_whole(folder, file, known)]
    for name in lost:
        path = folder / name
        if path.is_symlink():
            (path.parent / path.readlink()).unlink(missing_ok=True)
        path.unlink()
    if lost:
        # The listing may be what was wrong.
        (folder.parents[1] / "trees" / f"{folder.name}.json").unlink(missing_ok=True)
        raise DataLoss("what came is not what the hub lists", field=lost[0])


def _is_whole(folder: Path, file: RepoFile, known: Collection[str]) -> bool:
    path = folder / file.path
    if path.is_symlink() and path.readlink().name in known:
        return True
    return git_hash(path.read_bytes()) == file.blob_id if file.lfs is None else file_digest(path) == file.lfs.sha256


def _download(
    repository: str, revision: str | None, kind: Kind, cache_dir: Path | None, progress: Progress | None
) -> Path:
    """The folder of the commit, in the cache. It may be partial if the Hub has not listed the commit's files yet."""
    # The client reads the variable when it is imported; here it may be set later.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, library_name=AGENT)

    def snapshot(**how: Any) -> Path:
        folder = api.snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(FILES[kind]),
            ignore_patterns=["*/*", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES)],
            **how,
        )
        return Path(folder)

    try:
        return snapshot(tqdm_class=reporting_bar(progress))
    except Exception as error:  # of any class: what the client makes of an answer that makes no sense
        try:
            return snapshot(local_files_only=True)
        except LocalEntryNotFoundError:
            raise translated(error, repository, revision) from error
