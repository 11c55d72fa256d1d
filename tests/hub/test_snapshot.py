"""Snapshots over real HTTP: the real client against a Hub stand-in."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from lorarep_runtime.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from lorarep_runtime.hub.snapshot import Snapshot
from tests.support.hub_faults import FaultyHub
from tests.support.repositories import ADAPTER, BASE, GONE, REPOSITORY, contents, write


def test_stand_in_answers_the_client_as_the_hub_does(hub: FaultyHub, publish, tmp_path: Path) -> None:
    first = publish(ADAPTER)
    api = HfApi(endpoint=hub.url)
    info = api.model_info(REPOSITORY, files_metadata=True)
    assert info.sha == first
    assert {s.rfilename: s.size for s in info.siblings} == {name: len(data) for name, data in ADAPTER.items()}
    weights = next(s for s in info.siblings if s.rfilename == "adapter_model.safetensors")
    assert weights.lfs.sha256 == hashlib.sha256(ADAPTER["adapter_model.safetensors"]).hexdigest()
    assert {f.path for f in api.list_repo_tree(REPOSITORY, recursive=True)} == set(ADAPTER)
    second = publish({"adapter_config.json": b"changed", "deep/er file.txt": b"x"})
    assert api.model_info(REPOSITORY).sha == second != first
    path = hf_hub_download(REPOSITORY, "deep/er file.txt", cache_dir=tmp_path, endpoint=hub.url)
    assert Path(path).read_bytes() == b"x"
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPOSITORY, revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPOSITORY, "none", cache_dir=tmp_path, endpoint=hub.url)


def test_old_commit_is_fetched_after_main_moved(publish, fetch) -> None:
    old = publish(ADAPTER)
    new = publish({**ADAPTER, "adapter_model.safetensors": b"other weights"})
    at_old, at_main = fetch(revision=old), fetch()
    assert (at_old.commit, at_main.commit) == (old, new)
    assert contents(at_old) == ADAPTER
    assert contents(at_main)["adapter_model.safetensors"] == b"other weights"
    assert contents(fetch(revision=old)) == ADAPTER


def test_branch_and_tag_resolve_to_their_commit(hub: FaultyHub, publish, fetch) -> None:
    main = publish(ADAPTER)
    dev = publish({**ADAPTER, "tokenizer.json": b"[]"}, branch="feature/x")
    hub.tag(REPOSITORY, "v1.0", main)
    publish({**ADAPTER, "adapter_config.json": b"later"})
    assert [fetch(revision=name).commit for name in ("feature/x", "v1.0")] == [dev, main]
    assert fetch(revision="v1.0") == Snapshot(fetch(revision=main).folder, REPOSITORY, main)


def test_commit_in_the_cache_needs_no_request(hub: FaultyHub, publish, fetch) -> None:
    commit = publish(ADAPTER)
    fetch()
    hub.asked.clear()
    assert fetch(revision=commit).commit == commit
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["", "../main", "a..b", "/x", "a b", "a\nb", "x" * 256, "a:b", "~1"])
def test_malformed_revision_is_refused_without_a_request(hub: FaultyHub, fetch, revision: str) -> None:
    with pytest.raises(InvalidArgument, match="revision"):
        fetch(revision=revision)
    assert hub.asked == []


def test_missing_repository_or_revision_is_not_found(publish, fetch) -> None:
    publish(ADAPTER)
    with pytest.raises(NotFound, match="org/none"):
        fetch("org/none")
    with pytest.raises(NotFound, match="no-such-branch"):
        fetch(revision="no-such-branch")
    with pytest.raises(NotFound):
        fetch(revision=GONE)


def test_a_base_with_an_adapter_beside_its_weights_is_refused(publish, fetch, tmp_path: Path) -> None:
    """`transformers` loads both, where PEFT is installed, and lorarep has the adapters apart."""
    publish({**BASE, **ADAPTER})
    for source in (REPOSITORY, str(write(tmp_path / "folder", {**BASE, **ADAPTER}))):
        with pytest.raises(FailedPrecondition, match=r"^adapter_config\.json: .*beside"):
            fetch(source, kind="base")


def test_shards_are_those_of_the_index_whatever_their_names(hub: FaultyHub, publish, fetch) -> None:
    """As `transformers` takes them; other weights of the repository stay there."""
    names = [f"model.safetensors-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": dict(zip("ab", names, strict=True))})
    base = {"config.json": b"{}", "model.safetensors.index.json": index.encode(), **dict.fromkeys(names, b"shard")}
    publish({**base, "consolidated.safetensors": b"the same once more"})
    assert contents(fetch(kind="base")) == base
    assert "consolidated.safetensors" not in hub.downloads()
    hub.asked.clear()
    hub.status = 500
    assert contents(fetch(kind="base")) == base


def test_a_shard_of_any_name_that_does_not_come_is_unavailable_until_it_does(
    hub: FaultyHub, publish, fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.dumps({"weight_map": {"a": "odd-1.safetensors", "b": "odd-2.safetensors"}}).encode()
    base = {"config.json": b"{}", "model.safetensors.index.json": index, "odd-1.safetensors": b"1"}
    publish(base := {**base, "odd-2.safetensors": b"2"})
    hub.faulty, hub.status = "odd-2", 503
    with pytest.raises(Unavailable, match=r"org/name: .*cannot answer for now"):
        fetch(kind="base")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(Unavailable, match=r"org/name: .*lacks odd-2.safetensors"):
            fetch(kind="base")
    hub.faulty = ""
    with pytest.raises(Unavailable, match=r"org/name: .*cannot answer for now"):
        fetch(kind="base")
    hub.status = None
    assert contents(fetch(kind="base")) == base


def test_base_is_fetched_with_all_shards_and_nothing_else(hub: FaultyHub, publish, fetch) -> None:
    surplus = [
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/model.safetensors",
        "modeling.py",
        "README.md",
    ]
    publish({**BASE, **dict.fromkeys(surplus, b"surplus")})
    fetched = fetch(kind="base")
    assert set(contents(fetched)) == set(BASE) == set(hub.downloads())


def test_a_fetch_leaves_no_thread(publish, fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "monitor", None)  # as in a process that has shown no bar yet
    before = set(threading.enumerate())
    for i in range(3):
        publish({**ADAPTER, "adapter_model.safetensors": f"weights {i}"})
        fetch(progress=lambda stage, done, total: None)
    assert [thread.name for thread in set(threading.enumerate()) - before if "tqdm" in thread.name] == []


def test_progress_reaches_all_bytes_of_all_files(publish, fetch) -> None:
    publish(ADAPTER)
    told: list[tuple[str, int, int]] = []
    fetch(progress=lambda *report: told.append(report))
    size = sum(len(data) for data in ADAPTER.values())
    assert told[-1] == ("download", size, size)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


@pytest.mark.parametrize("kind", ["adapter", "base"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "weights.pt", "weights.pth", "weights.pkl"])
def test_pickle_is_refused_by_name_and_never_asked_for(hub, publish, fetch, tmp_path: Path, kind, name) -> None:
    files = {"adapter_config.json": b"{}", "config.json": b"{}", name: b"pickle"}
    publish(files)
    for source in (REPOSITORY, str(write(tmp_path / "folder", files))):
        with pytest.raises(FailedPrecondition, match=name):
            fetch(source, kind=kind)
    assert not any(asked.file == name for asked in hub.asked)


def test_pickle_beside_safetensors_is_left_alone(hub: FaultyHub, publish, fetch) -> None:
    publish({**ADAPTER, "training_args.bin": b"pickle", "optimizer.pt": b"pickle"})
    assert contents(fetch()) == ADAPTER


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("adapter", "adapter_config.json"),
        ("adapter", "adapter_model.safetensors"),
        ("adapter", "tokenizer.json"),
        ("base", "config.json"),
        ("base", "model-2.safetensors"),
        ("base", "model.safetensors.index.json"),
        ("base", "tokenizer.model"),
        ("config", "config.json"),
    ],
)
def test_a_pointer_of_git_lfs_is_named_with_what_to_run(publish, fetch, tmp_path: Path, kind: Any, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    files = {**(ADAPTER if kind == "adapter" else BASE), name: pointer}
    publish(files)
    for source in (REPOSITORY, str(write(tmp_path / "folder", files))):
        with pytest.raises(FailedPrecondition, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
            fetch(source, kind=kind)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_repository_that_is_no_adapter_is_not_found(publish, fetch, missing: str) -> None:
    publish({name: data for name, data in ADAPTER.items() if name != missing})
    with pytest.raises(NotFound, match=missing):
        fetch()


def test_shard_that_the_index_names_is_missed(publish, fetch, tmp_path: Path) -> None:
    files = {name: data for name, data in BASE.items() if name != "model-2.safetensors"}
    publish(files)
    for source in (REPOSITORY, str(write(tmp_path / "folder", files))):
        with pytest.raises(DataLoss, match=r"model-2\.safetensors"):
            fetch(source, kind="base")
