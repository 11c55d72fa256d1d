"""A Hub that fails, lies or leaves, full disks and killed downloads: what is served, and what the cache keeps."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import RepoFile, constants, get_cached_repo_tree, hf_hub_download
from huggingface_hub.utils import _http

from lorarep_runtime.errors import DataLoss, Exhausted, NotFound, PermissionDenied, Unavailable
from lorarep_runtime.hub import cache, files, snapshot
from lorarep_runtime.hub.files import file_digest
from tests.support.hub_faults import FaultyHub
from tests.support.repositories import ADAPTER, BASE, REPOSITORY, bounds, contents, write


def test_cached_adapter_is_served_with_the_hub_gone(hub: FaultyHub, publish, fetch) -> None:
    commit = publish(ADAPTER)
    hub.tag(REPOSITORY, "v1", commit)
    fetched = fetch()
    fetch(revision="v1")
    hub.close()
    assert fetch() == fetch(revision="v1") == fetch(revision=commit) == fetched
    assert contents(fetched) == ADAPTER


def test_cached_adapter_is_served_after_its_repository_went(hub: FaultyHub, publish, fetch) -> None:
    publish(ADAPTER)
    fetched = fetch()
    del hub.repositories[REPOSITORY]
    assert fetch() == fetched


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failing_hub_is_unavailable_unless_cached(hub: FaultyHub, publish, fetch, status: int) -> None:
    publish(ADAPTER)
    fetched = fetch()
    hub.status = status
    assert fetch() == fetched
    with pytest.raises(Unavailable, match=r"org/other|rate"):
        fetch("org/other")


@pytest.mark.parametrize("stage", ["/revision/", "/tree/", "adapter_config.json"])
def test_stalled_hub_is_unavailable_unless_cached(
    hub: FaultyHub, publish, fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    publish(ADAPTER, branch="dev")
    hub.publish("org/other", tmp_path / "published-0", branch="dev")
    fetch(revision="dev")
    hub.faulty, hub.stalled = stage, True
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    assert contents(fetch(revision="dev")) == ADAPTER
    with pytest.raises(Unavailable, match="org/other at dev"):
        fetch("org/other", revision="dev")


def test_a_storage_that_says_nothing_is_never_asked(hub: FaultyHub, publish, tmp_path: Path) -> None:
    """Whatever has been imported before: the client reads its variable once."""
    publish(ADAPTER)
    hub.has_xet = True
    program = (
        "import sys; from pathlib import Path; import huggingface_hub.file_download\n"
        "from lorarep_runtime.hub.snapshot import fetch\n"
        "fetch(sys.argv[1], None, kind='adapter', cache_dir=Path(sys.argv[2]))"
    )
    cache = tmp_path / "cache"
    subprocess.run([sys.executable, "-c", program, REPOSITORY, str(cache)], check=True, timeout=45)
    (weights,) = cache.glob("*/snapshots/*/adapter_model.safetensors")
    assert weights.read_bytes() == ADAPTER["adapter_model.safetensors"]
    assert not [asked.path for asked in hub.asked if "xet" in asked.path]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("stage", ["/tree/", "/resolve/"])
def test_pause_that_an_answer_names_is_not_waited_out(
    hub: FaultyHub, publish, fetch, monkeypatch: pytest.MonkeyPatch, stage: str, status: int
) -> None:
    publish(ADAPTER)
    _http.close_session()  # as the client itself does after a connection that failed
    rests: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=rests.append))
    hub.faulty, hub.status = stage, status
    with pytest.raises(Unavailable, match="3600 s"):
        fetch()
    assert rests == []


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_is_permission_denied(hub: FaultyHub, publish, fetch, status: int) -> None:
    publish(ADAPTER)
    hub.status = status
    with pytest.raises(PermissionDenied, match=REPOSITORY):
        fetch()


def test_broken_connection_continues_where_it_broke(hub: FaultyHub, publish, fetch) -> None:
    kept = constants.DOWNLOAD_CHUNK_SIZE
    weights = os.urandom(kept + 4096)
    publish({**ADAPTER, "adapter_model.safetensors": weights})
    hub.cuts["adapter_model.safetensors"] = [kept + 1024]
    assert contents(fetch())["adapter_model.safetensors"] == weights
    ranges = [asked.range for asked in hub.asked if asked.method == "GET" and asked.file == "adapter_model.safetensors"]
    assert ranges == [None, f"bytes={kept}-"]
    assert hub.served["adapter_model.safetensors"] == len(weights) + 1024


@pytest.mark.parametrize("lost", list(ADAPTER))
def test_partial_download_is_never_taken_for_whole(hub: FaultyHub, publish, fetch, lost: str) -> None:
    commit = publish(ADAPTER)
    hub.cuts[lost] = [1] * 6
    with pytest.raises(Unavailable):
        fetch()
    hub.status = 500
    for revision in (None, commit):
        with pytest.raises(Unavailable):
            fetch(revision=revision)
    hub.status = None
    hub.asked.clear()
    assert contents(fetch()) == ADAPTER
    assert hub.downloads() == [lost]


def test_files_of_unknown_number_are_never_taken_for_whole(hub: FaultyHub, publish, fetch, tmp_path: Path) -> None:
    """Another program fetched some of them, one by one."""
    publish(ADAPTER)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        hf_hub_download(REPOSITORY, name, cache_dir=tmp_path / "cache", endpoint=hub.url)
    hub.status = 500
    with pytest.raises(Unavailable, match="part of it"):
        fetch()


@pytest.mark.parametrize("kind", ["adapter", "base"])
@pytest.mark.parametrize("client", ["an older one", "one that asks for each file"])
def test_offline_a_complete_cache_starts_whoever_has_filled_it(
    hub: FaultyHub, publish, fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str, kind: str
) -> None:
    """PEFT and `transformers` ask for each file; clients before 1.24 kept no list of them."""
    files = ADAPTER if kind == "adapter" else BASE
    publish(files)
    if client == "an older one":
        snapshot.fetch(REPOSITORY, None, kind=kind, cache_dir=tmp_path / "newer")
        without_list = shutil.ignore_patterns("trees")
        shutil.copytree(tmp_path / "newer", tmp_path / "cache", symlinks=True, ignore=without_list)
    else:
        for name in files:
            hf_hub_download(REPOSITORY, name, cache_dir=tmp_path / "cache", endpoint=hub.url)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = fetch(kind=kind)
    assert contents(found).keys() == files.keys()
    needed = "adapter_model.safetensors" if kind == "adapter" else "model-2.safetensors"
    (found.folder / needed).unlink()
    with pytest.raises((NotFound, DataLoss, Unavailable), match=needed):
        fetch(kind=kind)
    assert hub.asked == []


def test_a_repository_that_was_renamed_is_found_under_its_old_name(hub: FaultyHub, publish, fetch) -> None:
    commit = publish(ADAPTER)
    hub.renamed["org/old"] = REPOSITORY
    for limits in (None, bounds()):
        found = fetch("org/old", bounds=limits)
        assert (found.commit, contents(found)) == (commit, ADAPTER)


def test_killed_download_leaves_nothing_whole_and_a_restart_continues(
    hub: FaultyHub, publish, fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(ADAPTER)
    hub.hangs["adapter_model.safetensors"] = 5
    program = (
        "import sys; from pathlib import Path; from lorarep_runtime.hub.snapshot import fetch\n"
        "fetch(sys.argv[1], None, kind='adapter', cache_dir=Path(sys.argv[2]))"
    )
    with subprocess.Popen([sys.executable, "-c", program, REPOSITORY, str(tmp_path / "cache")]) as process:
        assert hub.hanging.wait(600)
        process.kill()
    hub.close()
    with pytest.raises(Unavailable):
        fetch()
    kept = {path.name for path in tmp_path.glob("cache/*/snapshots/*/*")}
    with FaultyHub() as restarted:
        monkeypatch.setenv("HF_ENDPOINT", restarted.url)
        restarted.publish(REPOSITORY, tmp_path / "published-0")
        assert contents(fetch()) == ADAPTER
        assert "adapter_model.safetensors" not in kept
        assert "adapter_model.safetensors" in restarted.downloads()
        assert not kept & set(restarted.downloads())


def test_full_disk_is_exhausted_and_the_next_try_succeeds(publish, fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(ADAPTER)
    opened = Path.open

    def open_on_full_disk(path: Path, *how: Any, **options: Any) -> Any:
        return opened(Path("/dev/full") if path.suffix == ".incomplete" else path, *how, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(Exhausted, match="disk"):
            fetch()
    assert contents(fetch()) == ADAPTER


@pytest.mark.parametrize("size", [0, 29_999, 30_000, 100_000])
def test_digest_is_sha256_of_the_file(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DIGEST_BYTES", 30_000)
    data = os.urandom(size)
    assert file_digest(write(tmp_path, {"file": data}) / "file") == hashlib.sha256(data).hexdigest()


def test_parts_that_killed_processes_left_go_in_time(publish, fetch) -> None:
    publish(ADAPTER)
    blobs = fetch().folder.parents[1] / "blobs"
    for name, age in (("old.incomplete", 2 * cache.ABANDONED_SECONDS), ("new.incomplete", 0)):
        (blobs / name).write_bytes(b"part")
        os.utime(blobs / name, (time.time() - age,) * 2)
    fetch()
    assert [path.name for path in blobs.glob("*.incomplete")] == ["new.incomplete"]


@pytest.mark.parametrize("read_before", [True, False])
def test_a_wrong_file_that_another_load_has_removed_is_data_loss(
    hub: FaultyHub, publish, fetch, monkeypatch, read_before: bool
) -> None:
    """Loads of one repository under two names find the same file wrong."""
    publish(ADAPTER)
    folder = fetch().folder
    tree = get_cached_repo_tree(REPOSITORY, revision=folder.name, cache_dir=folder.parents[2])
    weights = folder / "adapter_model.safetensors"
    weights.resolve().write_bytes(b"cut")

    real = cache._is_whole

    def removed(folder: Path, file: RepoFile, known: Collection[str]) -> bool:
        is_whole = read_before and real(folder, file, known)
        if file.path == weights.name:
            weights.resolve().unlink()
            weights.unlink()
        return is_whole if read_before else real(folder, file, known)

    monkeypatch.setattr(cache, "_is_whole", removed)
    with pytest.raises(DataLoss, match="adapter_model"):
        cache.check_contents(folder, tree, ())
    assert not weights.exists()


@pytest.mark.parametrize("names", [["adapter_model.safetensors"], ["adapter_config.json", "adapter_model.safetensors"]])
def test_what_a_claim_cuts_is_data_loss_and_comes_anew(hub: FaultyHub, publish, fetch, names: list[str]) -> None:
    publish(ADAPTER)
    hub.claims = dict.fromkeys(names, 5)
    with pytest.raises(DataLoss, match=names[0]):
        fetch()
    hub.claims.clear()
    assert contents(fetch()) == ADAPTER
