"""From a Hub repository or a folder to a verified local snapshot. Nothing else here talks to the Hub.

`huggingface_hub` does the talking and keeps its usual cache, so what `hf download` fetched is found. It continues a
download whose connection broke with a Range request; after a restart it keeps the files that were complete.
`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_DOWNLOAD_TIMEOUT` (seconds without data; default 10) mean what they mean there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from mmap import mmap
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, RepoFile, constants, get_cached_repo_tree, set_client_factory
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from huggingface_hub.utils.tqdm import tqdm

from lorarep_runtime.errors import (
    DataLoss,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    LorarepError,
    NotFound,
    PermissionDenied,
    Unavailable,
)

Kind = Literal["base", "config", "adapter"]
"""What is wanted of a repository: a base, a base's configuration without its weights, an adapter."""
Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done and how much there is; from any thread. A download counts bytes."""

ABANDONED = 3600.0
"""Seconds for which nobody has written a part of a download that nobody is still at."""

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

_AGENT = "lorarep"
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
        raise InvalidArgument(f"revision: {revision!r} is not the name of a branch, tag or commit")
    known = _blobs(source, cache_dir)
    folder = _download(source, revision, kind, cache_dir, progress)
    try:
        tree = get_cached_repo_tree(source, revision=folder.name, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError as error:
        # Without the listing nobody can tell a whole snapshot from a partial one.
        raise Unavailable(f"{source}: the hub cannot be reached, and the cache may hold only part of it") from error
    _check_files({file.path for file in tree}, kind, source)
    _check_contents(folder, tree, known)
    if kind == "base":
        _check_shards(folder)
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
        raise PermissionDenied(f"repository: {repository!r} is not on the allow-list")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    # Not `hashlib.file_digest`: that reads 256 KiB at a time, and takes the interpreter from others after each. Nor a
    # bytearray, which is filled with zeros, for some milliseconds, before it lets go of the interpreter.
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file, mmap(-1, DIGEST_BYTES) as pages, memoryview(pages) as buffer:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _check_repository(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InvalidArgument(f"repository: {repository!r} is not a repository id such as 'org/name'") from error


def _local(source: str, revision: str | None, kind: Kind) -> Snapshot:
    if revision is not None:
        raise InvalidArgument(f"revision: {revision!r}, but {source!r} is a folder")
    folder = Path(os.path.realpath(os.path.expanduser(source)))
    if not folder.is_dir():
        raise NotFound(f"{source}: no such folder")
    if kind == "adapter":
        _check_links(folder)
    _check_files({path.name for path in folder.iterdir() if path.is_file()}, kind, source)
    if kind == "base":
        _check_shards(folder)
    return Snapshot(folder, str(folder), LOCAL)


def _check_links(folder: Path) -> None:
    in_cache = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    inside = folder.parents[2] if in_cache else folder  # the Hub cache links its snapshots' files to its blobs
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise InvalidArgument(f"{path.relative_to(folder)}: a symbolic link that leads out of the folder")


def _check_files(names: Collection[str], kind: Kind, source: str) -> None:
    if not any(name in names for name in WEIGHTS[kind]):
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles:
            raise FailedPrecondition(f"{source}: {pickles[0]} is a pickle, which is never opened; use safetensors")
        raise NotFound(f"{source}: has no {WEIGHTS[kind][0]}")
    if CONFIG[kind] not in names:
        raise NotFound(f"{source}: has no {CONFIG[kind]}")


def _check_shards(folder: Path) -> None:
    index = folder / INDEX
    if not index.exists() or (folder / WEIGHTS["base"][0]).exists():
        return
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataLoss(f"{INDEX}: not an index of safetensors") from error
    if missing:
        raise DataLoss(f"{INDEX}: names {missing[0]}, which is not there")


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
        raise DataLoss(f"{lost[0]}: what came is not what the hub lists")


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
    api = HfApi(endpoint=endpoint, library_name=_AGENT)

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
        return snapshot(tqdm_class=_reporting(progress))
    except Exception as error:  # of any class: what the client makes of an answer that makes no sense
        try:
            return snapshot(local_files_only=True)
        except LocalEntryNotFoundError:
            raise _translated(error, repository, revision) from error


def _translated(error: Exception, repository: str, revision: str | None) -> LorarepError:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    at = repository if revision is None else f"{repository} at {revision}"
    if isinstance(error, LorarepError):
        return type(error)(f"{at}: {error}")
    if isinstance(error, GatedRepoError | DisabledRepoError):
        return PermissionDenied(f"{at}: the hub refuses access")
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"revision: {repository} has no {revision!r}")
    if isinstance(error, RepositoryNotFoundError):
        return NotFound(f"repository: the hub knows no {repository!r}, or hides it from this token")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if status in (401, 403):
        return PermissionDenied(f"{at}: the hub refuses access: {reason}")
    if status in (404, 410):
        return NotFound(f"{at}: {reason}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(f"{at}: the disk of the hub cache is full")
    if isinstance(error, OSError) and error.errno is not None:
        return FailedPrecondition(f"{at}: the hub cache cannot be used: {error}")
    return Unavailable(f"{at}: the hub cannot be reached, and the cache does not hold all of it: {reason}")


def _patient_client() -> Any:
    """A client that bounds every request of ours, as the usual one does not: it waits without end for a listing, a
    minute for each of six tries at a file's headers, and through any pause that an answer names.
    """
    client = default_client_factory()
    client.event_hooks["request"].append(_limit_wait)
    client.event_hooks["response"].append(_refuse_pause)
    return client


# Each new client's: the library throws its client away after a connection that failed, in the middle of its tries.
set_client_factory(_patient_client)


def _is_ours(request: Any) -> bool:
    agent: str = request.headers.get("user-agent", "")
    return agent.startswith(f"{_AGENT}/")


def _limit_wait(request: Any) -> None:
    if _is_ours(request):
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)


def _refuse_pause(response: Any) -> None:
    status, pause = response.status_code, response.headers.get("retry-after")
    if _is_ours(response.request) and (status == 429 or (pause is not None and status >= 500)):
        what = "limits the rate of requests" if status == 429 else "cannot answer for now"
        raise Unavailable(f"the hub {what}" + (f"; retry after {pause} s" if pause else ""))


def _reporting(progress: Progress | None) -> type[tqdm]:
    lock = threading.Lock()

    class Bar(tqdm):
        """Shows nothing; the bar of all files' bytes reports."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.reports = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self.reports and progress is not None:
                    progress("download", int(self.n), int(self.total or 0))

    return Bar
