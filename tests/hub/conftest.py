"""Repositories at the Hub's stand-in, and fetches from it into a cache of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from lorarep_runtime.hub import snapshot
from lorarep_runtime.hub.snapshot import Snapshot
from tests.support.hub_faults import FaultyHub
from tests.support.repositories import REPOSITORY, write


@pytest.fixture
def publish(hub: FaultyHub, tmp_path: Path) -> Callable[..., str]:
    def publish(files: dict[str, Any], branch: str = "main") -> str:
        folder = tmp_path / f"published-{len(list(tmp_path.glob('published-*')))}"
        return hub.publish(REPOSITORY, write(folder, files), branch=branch)

    return publish


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Snapshot]:
    """With a cache of the test's own, and a client that does not rest between tries."""
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))

    def fetch(source: str = REPOSITORY, revision: str | None = None, kind: Any = "adapter", **how: Any) -> Snapshot:
        return snapshot.fetch(source, revision, kind=kind, cache_dir=tmp_path / "cache", **how)

    return fetch
