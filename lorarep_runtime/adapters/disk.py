"""The disk tier: adapters' repositories in the Hub cache, within a budget.

The cache is huggingface_hub's own, and other programs may keep models and datasets there. A repository is deleted only
if it has an `adapter_config.json`, no model of its own, and no user.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CachedRepoInfo, CacheNotFound, scan_cache_dir

from lorarep_runtime.errors import Exhausted
from lorarep_runtime.hub.files import CONFIG
from lorarep_runtime.hub.snapshot import LOCAL, Snapshot

log = logging.getLogger(__name__)

SHARE_AFTER = 0.9
"""Part of the budget that may be in use after a deletion, so that not every download deletes."""
MODEL_CONFIG = CONFIG["base"]
ADAPTER_CONFIG = CONFIG["adapter"]


@dataclass(frozen=True, eq=False)
class DiskLoad:
    """One load of an adapter; several may be of one repository at a time."""

    repository: str


class DiskBudget:
    """Keeps adapters' repositories in the Hub cache within a limit. Thread-safe.

    Args:
        cache_dir: Hub cache; None is huggingface_hub's default.
        limit: most bytes of adapters' repositories.
        uses: returns the repositories that the server knows, each with the tick of its last use, or None while it is
            in use and has to stay.
    """

    def __init__(self, cache_dir: Path | None, limit: int, uses: Callable[[], Mapping[str, int | None]]) -> None:
        self._cache_dir = cache_dir
        self._limit = limit
        self._uses = uses
        self._lock = threading.Lock()
        self._reads: Counter[str] = Counter()
        self._reads_lock = threading.Lock()
        self._coming: dict[DiskLoad, int] = {}
        """Bytes that are being downloaded, by load."""
        self._held = {repo.repo_id: repo.size_on_disk for repo in self._scan()}

    @contextmanager
    def staying(self, repository: str) -> Iterator[DiskLoad]:
        """Keeps a repository in the cache while its files are looked for or read."""
        load = DiskLoad(repository)
        with self._reads_lock:
            self._reads[repository] += 1
        try:
            yield load
        finally:
            with self._reads_lock:
                self._reads[repository] -= 1
            if load in self._coming:  # no other thread adds it
                with self._lock:
                    del self._coming[load]

    def expect(self, load: DiskLoad, size: int) -> None:
        """Counts bytes that a load, of `staying`, is about to download; other repositories may go for them.

        Raises:
            Exhausted: the limit has no room for them beside what is in use.
        """
        if not size:
            return
        with self._lock:
            others = sum(self._coming.values()) - self._coming.get(load, 0)
            if others + size <= self._limit:
                self._coming[load] = size
                if self._total <= self._limit:
                    return
                self._trim()
                if self._total <= self._limit:
                    return
                del self._coming[load]
        raise Exhausted(
            f"adapters' disk: {size} bytes of {load.repository} have no room within {self._limit}",
            field="adapter",
            retry_after=1.0,
        )

    def added(self, load: DiskLoad, snapshot: Snapshot) -> None:
        """Counts what a load has found or downloaded; over the limit, the least recently used others go."""
        if snapshot.commit == LOCAL:
            return
        blobs = snapshot.cached / "blobs"
        with self._lock:
            self._held[snapshot.repository] = sum(map(_size, blobs.iterdir()))
            self._coming.pop(load, None)
            if self._total > self._limit:
                self._trim()

    @property
    def _total(self) -> int:
        """Bytes that adapters take in the cache, and those that are being downloaded."""
        return sum(self._held.values()) + sum(self._coming.values())

    def _scan(self) -> list[CachedRepoInfo]:
        """The adapters' repositories in the cache."""
        try:
            return [repo for repo in scan_cache_dir(self._cache_dir).repos if _is_adapter(repo)]
        except CacheNotFound:
            return []

    def _trim(self) -> None:
        """Deletes idle repositories, the least recently used first, down to `SHARE_AFTER` of the limit."""
        info = scan_cache_dir(self._cache_dir)
        repos = [repo for repo in info.repos if _is_adapter(repo)]
        uses = self._uses()
        held = sum(repo.size_on_disk for repo in repos) + sum(self._coming.values())
        deleted: list[CachedRepoInfo] = []
        for repo in sorted(repos, key=lambda x: (uses.get(x.repo_id) or 0, x.last_accessed)):
            if held <= self._limit * SHARE_AFTER:
                break
            if uses.get(repo.repo_id, 0) is not None:
                with self._reads_lock:
                    if self._reads[repo.repo_id] or self._uses().get(repo.repo_id, 0) is None:
                        continue
                    # By itself: a renamed repository, or one whose case differs, has the same commits.
                    alone = replace(info, repos=frozenset({repo}))
                    alone.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()
                deleted.append(repo)
                held -= repo.size_on_disk
        self._held = {repo.repo_id: repo.size_on_disk for repo in self._scan()}
        log.info("the hub cache holds %d bytes of adapters; %d repositories have left it", held, len(deleted))
        if held > self._limit:
            log.warning("adapters in use take %d bytes of the hub cache, the limit is %d", held, self._limit)


def _size(file: Path) -> int:
    """Bytes of a file; none if another download of the repository has renamed it meanwhile."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _is_adapter(repo: CachedRepoInfo) -> bool:
    names = {file.file_name for revision in repo.revisions for file in revision.files}
    return repo.repo_type == "model" and ADAPTER_CONFIG in names and MODEL_CONFIG not in names
