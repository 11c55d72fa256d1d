"""huggingface_hub's client: downloads whose every request is bounded in time, and whose errors are lorarep's.

Importing this module sets the client factory of huggingface_hub for the whole process; requests of others, which carry
another user agent, stay as they were. It also turns Xet storage off for the whole process: files come over plain HTTP.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_cached_repo_tree, set_client_factory
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# It has no public name: a client of our own making would lack the hook that the library adds to its own.
from huggingface_hub.utils._http import default_client_factory
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
    first_line,
)
from lorarep_runtime.hub.bounds import Bounds, check_small, check_weights, listed, resolve
from lorarep_runtime.hub.cache import check_contents, known_blobs, remember_ref, snapshot_folder
from lorarep_runtime.hub.files import Part, check_listed, check_pointers, missing_shards
from lorarep_runtime.hub.look import Look, look_at
from lorarep_runtime.progress import Progress

AGENT = "lorarep"
"""The name by which the Hub, and the hooks here, know our requests."""


def download(
    repository: str,
    revision: str | None,
    part: Part,
    cache_dir: Path | None,
    progress: Progress | None,
    bounds: Bounds | None = None,
    look: Look | None = None,
) -> Path:
    """Downloads the files of a part that the cache does not hold yet.

    Args:
        repository: its id.
        revision: branch, tag or commit; None is the default branch.
        part: of the repository, that is wanted.
        cache_dir: Hub cache; None is huggingface_hub's default.
        progress: told of bytes, as stage "download".
        bounds: on an adapter; None is for what an operator has named.
        look: at an adapter, before its weights are downloaded.

    Returns:
        The commit's folder in the cache. It may be partial if the Hub did not answer and never listed the commit's
        files.

    Raises:
        LorarepError: as `hub.snapshot.fetch`; the cache does not help out.
    """
    # The client reads the variable when it is imported; here it may be set later.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, library_name=AGENT)

    def snapshot(revision: str | None = revision, patterns: Sequence[str] = part.wanted, **how: Any) -> Path:
        folder = api.snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(patterns),
            ignore_patterns=list(part.unwanted),
            **how,
        )
        return Path(folder)

    def bounded(bounds: Bounds) -> Path:
        # 1. The list, of a commit that cannot move any more.
        commit = resolve(api, repository, revision, part, cache_dir)
        files = listed(api, repository, commit, part, cache_dir)
        check_small(files, part, bounds)
        # 2. The config and the header of the weights, which say how large these may be.
        folder = snapshot_folder(repository, commit, cache_dir)
        if configs := [file for file in files if file.path == part.config]:
            known = known_blobs(repository, cache_dir)
            snapshot(commit, [part.config], tqdm_class=_reporting_bar(None))
            check_contents(folder, configs, known)
        if look is not None:
            look_at(look, api, repository, part, folder, files)
        check_weights(files, part, folder, bounds)
        check_listed({file.path for file in files}, part, repository, bounds.allowed)  # the look's reasons go first
        # 3. All files.
        coming = (file for file in files if part.wants(file.path) and not (folder / file.path).exists())
        bounds.make_room(sum(file.size for file in coming))
        snapshot(commit, tqdm_class=_reporting_bar(progress))
        if revision != commit:
            remember_ref(repository, revision or constants.DEFAULT_REVISION, commit, cache_dir)
        return folder

    def looked(look: Look) -> str:
        """The commit, once its config and header have been looked at."""
        known = known_blobs(repository, cache_dir)
        folder = snapshot(patterns=[part.config], tqdm_class=_reporting_bar(None))
        try:
            files = get_cached_repo_tree(repository, revision=folder.name, cache_dir=cache_dir)
        except CachedRepoTreeNotFoundError:
            files = None
        check_contents(folder, [file for file in files or () if file.path == part.config], known)
        look_at(look, api, repository, part, folder, files)
        if files is not None:
            check_listed({file.path for file in files}, part, repository)
        return folder.name

    def whole() -> Path:
        at = revision
        if look is not None:
            at = looked(look)
        folder = snapshot(at, tqdm_class=_reporting_bar(progress))
        if part.kind == "base" and folder.is_dir():  # none is made for a repository without any file that is wanted
            check_pointers(folder, part.kind)
            # Shards may have any names: those are in the index alone.
            if shards := missing_shards(folder):
                snapshot(folder.name, shards, tqdm_class=_reporting_bar(progress))
        return folder

    try:
        return bounded(bounds) if bounds else whole()
    except (PermissionDenied, NotFound, FailedPrecondition, InvalidArgument, Exhausted, DataLoss):
        raise  # what is beyond its bounds, or not there, is not served from the cache either
    except Exception as error:  # of any class: the client fails in many ways over an answer that makes no sense
        missing: Sequence[str] = ()
        with suppress(LocalEntryNotFoundError):
            folder = snapshot(local_files_only=True)
            missing = missing_shards(folder) if part.kind == "base" else ()
            if not missing:
                return folder
        raise _translated(error, repository, revision, missing) from error


def _translated(error: Exception, repository: str, revision: str | None, missing: Sequence[str] = ()) -> LorarepError:
    """The client's error as one of lorarep's.

    Args:
        missing: files that the cache is known to lack.
    """
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    at = repository if revision is None else f"{repository} at {revision}"
    if isinstance(error, LorarepError):
        return type(error)(f"{at}: {error.message}", field=error.field)
    if isinstance(error, GatedRepoError | DisabledRepoError):
        return PermissionDenied(f"{at}: the hub refuses access")
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"{repository} has no {revision!r}", field="revision")
    if isinstance(error, RepositoryNotFoundError):
        return NotFound(f"the hub knows no {repository!r}, or hides it from this token", field="repository")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = first_line(error)
    if status in (401, 403):
        return PermissionDenied(f"{at}: the hub refuses access: {reason}")
    if status in (404, 410):
        return NotFound(f"{at}: {reason}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Exhausted(f"{at}: the disk of the hub cache is full")
    if isinstance(error, OSError) and error.errno is not None:
        return FailedPrecondition(f"{at}: the hub cache cannot be used: {error}")
    lacks = f"lacks {missing[0]}" if missing else "does not hold all of it"
    return Unavailable(f"{at}: the hub cannot be reached, and the cache {lacks}: {reason}")


def _reporting_bar(progress: Progress | None) -> type[tqdm]:
    """The class of a progress bar that shows nothing and reports the bytes of all files together."""
    lock = threading.Lock()

    class Bar(tqdm):
        # Of each class of bars a thread without end would watch those that are silent for long.
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.reports = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                if self.reports and progress is not None:
                    progress("download", int(self.n), int(self.total or 0))

    return Bar


# Bounds on requests.


def _bounded_client() -> Any:
    """A client that bounds each of our requests in time.

    The usual one waits without end for a listing, a minute for each of six tries at a file's headers, and through any
    pause that an answer names.
    """
    client = default_client_factory()
    client.event_hooks["request"].append(_limit_wait)
    client.event_hooks["response"].append(_refuse_pause)
    return client


def _is_ours(request: Any) -> bool:
    agent: str = request.headers.get("user-agent", "")
    return agent.startswith(f"{AGENT}/")


def _limit_wait(request: Any) -> None:
    if _is_ours(request):
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)


def _refuse_pause(response: Any) -> None:
    status, pause = response.status_code, response.headers.get("retry-after")
    if _is_ours(response.request) and (status == 429 or (pause is not None and status >= 500)):
        refusal = "limits the rate of requests" if status == 429 else "cannot answer for now"
        raise Unavailable(f"the hub {refusal}" + (f"; retry after {pause} s" if pause else ""))


# Xet's library, in Rust, downloads without any bound on time, and hears of no cancellation until bytes come. The client
# looks at this value for each file; HF_HUB_DISABLE_XET it has read already if another module imported it first.
constants.HF_HUB_DISABLE_XET = True

# A factory, not one client: the library replaces its client after a connection that failed, in the middle of its tries.
set_client_factory(_bounded_client)
