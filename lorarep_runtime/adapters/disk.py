"""The disk tier: what the Hub cache holds of adapters, within a budget.

The cache is huggingface_hub's own and may hold models, datasets and what others have downloaded: repositories are only
deleted if they have an `adapter_config.json` and no model of their own, and nobody uses them.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CachedRepoInfo, CacheNotFound, scan_cache_dir

from lorarep_runtime.hub.files import CONFIG
from lorarep_runtime.hub.snapshot import LOCAL, Snapshot

log = logging.getLogger(__name__)

SHARE_AFTER = 0.9
"""Part of the budget that is in use after others were deleted, so that not every download deletes."""
MODEL_CONFIG = CONFIG["base"]
ADAPTER_CONFIG = CONFIG["adapter"]


class DiskBudget:
    """Thread-safe.

    Args:
        cache_dir: as for `hub.fetch`.
        limit: bytes for adapters' repositories.
        uses: gives the repositories that the server knows, each with the tick of its last use, or None while it is in
            use and has to stay.
    """

    def __init__(self, cache_dir: Path | None, limit: int, uses: Callable[[], Mapping[str, int | None]]) -> None:
        self._cache_dir = cache_dir
        self._limit = limit
        self._uses = uses
        self._lock = threading.Lock()
        self._looked_at: Counter[str] = Counter()
        self._marks = threading.Lock()
        self._held = {repo.repo_id: repo.size_on_disk for repo in self._scan()}

    @contextmanager
    def staying(self, repository: str) -> Iterator[None]:
        """While somebody looks for its files or reads them it does not leave."""
        with self._marks:
            self._looked_at[repository] += 1
        try:
            yield
        finally:
            with self._marks:
                self._looked_at[repository] -= 1

    def added(self, snapshot: Snapshot) -> None:
        """Counts what has been found or downloaded, and deletes the least recently used others if it is too much."""
        if snapshot.commit == LOCAL:
            return
        blobs = snapshot.folder.parents[1] / "blobs"
        with self._lock:
            self._held[snapshot.repository] = sum(file.stat().st_size for file in blobs.iterdir())
            if sum(self._held.values()) > self._limit:
                self._trim()

    def _scan(self) -> list[CachedRepoInfo]:
        try:
            return [repo for repo in scan_cache_dir(self._cache_dir).repos if _is_adapter(repo)]
        except CacheNotFound:
            return []

    def _trim(self) -> None:
        info = scan_cache_dir(self._cache_dir)
        repos = [repo for repo in info.repos if _is_adapter(repo)]
        uses = self._uses()
        held = sum(repo.size_on_disk for repo in repos)
        going: list[CachedRepoInfo] = []
        for repo in sorted(repos, key=lambda x: (uses.get(x.repo_id) or 0, x.last_accessed)):
            if held <= self._limit * SHARE_AFTER:
                break
            if uses.get(repo.repo_id, 0) is not None:
                with self._marks:
                    if self._looked_at[repo.repo_id] or self._uses().get(repo.repo_id, 0) is None:
                        continue
                    # Alone: repositories that have been renamed, or whose case differs, have the same commits.
                    alone = replace(info, repos=frozenset({repo}))
                    alone.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()
                going.append(repo)
                held -= repo.size_on_disk
        self._held = {repo.repo_id: repo.size_on_disk for repo in self._scan()}
        log.info("the hub cache holds %d bytes of adapters; %d repositories have left it", held, len(going))
        if held > self._limit:
            log.warning("adapters in use take %d bytes of the hub cache, the limit is %d", held, self._limit)


def _is_adapter(repo: CachedRepoInfo) -> bool:
    names = {file.file_name for revision in repo.revisions for file in revision.files}
    return repo.repo_type == "model" and ADAPTER_CONFIG in names and MODEL_CONFIG not in names
