"""huggingface_hub's client, with bounds on every request."""

from __future__ import annotations

import errno
import threading
from typing import Any

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import tqdm

from lorarep_runtime.errors import (
    Exhausted,
    FailedPrecondition,
    LorarepError,
    NotFound,
    PermissionDenied,
    Unavailable,
    first_line,
)
from lorarep_runtime.progress import Progress

AGENT = "lorarep"


def translated(error: Exception, repository: str, revision: str | None) -> LorarepError:
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    at = repository if revision is None else f"{repository} at {revision}"
    if isinstance(error, LorarepError):
        return type(error)(f"{at}: {error}")
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
    return Unavailable(f"{at}: the hub cannot be reached, and the cache does not hold all of it: {reason}")


def _patient_client() -> Any:
    """A client that bounds every request of ours, as the usual one does not: it waits without end for a listing, a
    minute for each of six tries at a file's headers, and through any pause that an answer names.
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
        what = "limits the rate of requests" if status == 429 else "cannot answer for now"
        raise Unavailable(f"the hub {what}" + (f"; retry after {pause} s" if pause else ""))


def reporting_bar(progress: Progress | None) -> type[tqdm]:
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


# Each new client's: the library throws its client away after a connection that failed, in the middle of its tries.
set_client_factory(_patient_client)
