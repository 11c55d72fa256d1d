"""Snapshots over real HTTP: the real client against a Hub stand-in that can misbehave."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import (
    HfApi,
    RepoFile,
    constants,
    file_download,
    get_cached_repo_tree,
    hf_hub_download,
)
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import _http
from tqdm import tqdm

from lorarep_runtime.errors import (
    DataLoss,
    Exhausted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from lorarep_runtime.hub import cache, files, snapshot
from lorarep_runtime.hub.bounds import Bounds
from lorarep_runtime.hub.files import file_digest
from lorarep_runtime.hub.snapshot import LOCAL, Snapshot, check_allowed
from tests.support.hub_faults import FaultyHub

ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": b"weights of the adapter",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
BASE = {
    "config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.model": b"pieces",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ),
    "model-1.safetensors": b"first shard",
    "model-2.safetensors": b"second shard",
}
REPOSITORY = "org/name"
GONE = "0" * 40


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def contents(snapshot: Snapshot) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in snapshot.folder.iterdir()}


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


# The stand-in itself, as seen by the client.


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


# Revisions.


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


# What is downloaded.


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
        with pytest.raises(Unavailable, match=r"org/name: .*does not hold all of it"):
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


# What no operator has named.

KIB = 1 << 10


def bounds(weights: int = KIB, room: list[int] | None = None) -> Bounds:
    return Bounds(KIB, KIB, lambda folder: weights, (room if room is not None else []).append)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("adapter_config.json", KIB + 1),
        ("tokenizer.json", KIB + 1),
        ("any.model", KIB + 1),
        ("any.jinja", KIB + 1),
        ("adapter_model.safetensors", KIB + 1),
    ],
)
def test_a_file_that_is_too_large_is_refused_by_name_and_never_asked_for(
    hub: FaultyHub, publish, fetch, name: str, size: int
) -> None:
    publish({**ADAPTER, name: bytes(size)})
    with pytest.raises(FailedPrecondition, match=rf"{name}: \d+ bytes"):
        fetch(bounds=bounds())
    assert name not in hub.downloads()
    assert "adapter_model.safetensors" not in hub.downloads()
    assert fetch().commit  # an operator's own may be of any size


def test_many_files_of_a_tokenizer_are_bounded_together(hub: FaultyHub, publish, fetch) -> None:
    publish({**ADAPTER, **{f"{i}.model": bytes(100) for i in range(20)}})
    with pytest.raises(FailedPrecondition, match=r"over the limit of 1024"):
        fetch(bounds=bounds())
    assert hub.downloads() == []


def test_a_repository_of_too_many_files_is_refused(publish, fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorarep_runtime.hub.bounds.MAX_FILES", 9)
    publish({**ADAPTER, **{f"deep/{i}": b"" for i in range(6)}})
    with pytest.raises(FailedPrecondition, match="over 9 files"):
        fetch(bounds=bounds())


def test_what_is_within_its_bounds_comes_whole_and_room_is_made_before(hub: FaultyHub, publish, fetch) -> None:
    commit = publish(ADAPTER)
    room: list[int] = []
    assert contents(fetch(bounds=bounds(room=room))) == ADAPTER
    assert room == [sum(len(data) for name, data in ADAPTER.items() if name != "adapter_config.json")]
    assert hub.downloads() == sorted(ADAPTER)
    hub.close()
    for revision in (None, commit, "main"):
        assert fetch(revision=revision, bounds=bounds()).commit == commit


def test_a_pull_request_is_refused_by_name_and_by_commit(hub: FaultyHub, publish, fetch) -> None:
    first = publish(ADAPTER)
    second = publish({**ADAPTER, "tokenizer.json": b"[]"})
    foreign = publish({**ADAPTER, "tokenizer.json": b"[1]"}, branch="refs/pr/1")
    for revision in ("refs/pr/1", foreign, "refs/heads/main"):
        with pytest.raises(PermissionDenied, match="revision"):
            fetch(revision=revision, bounds=bounds())
    with pytest.raises(NotFound, match="no branch or tag 'none'"):
        fetch(revision="none", bounds=bounds())
    assert hub.downloads() == []
    assert [fetch(revision=of, bounds=bounds()).commit for of in (first, second, "main")] == [first, second, second]
    assert fetch(revision="refs/pr/1").commit == foreign  # an operator may
    with pytest.raises(PermissionDenied, match="revision"):
        fetch(revision="refs/pr/1", bounds=bounds())


def test_a_commit_is_looked_for_among_the_latest_alone(hub: FaultyHub, publish, fetch) -> None:
    """However long the history is: each of its pages is a request to the Hub, for a hash that anybody may invent."""
    at = publish(ADAPTER)
    stored = hub.repositories[REPOSITORY]
    older = [f"{i:040x}" for i in range(5000)]
    for commit in older:
        stored.commits[commit], stored.parents[at] = stored.commits[at], commit
        at = commit
    assert fetch(revision=older[900], bounds=bounds()).commit == older[900]
    hub.asked.clear()
    for commit in (older[4000], "f" * 40):
        with pytest.raises(PermissionDenied, match="latest 1000 commits"):
            fetch(revision=commit, bounds=bounds())
    assert sum("/commits/" in asked.path for asked in hub.asked) <= 2 * 21
    assert fetch(revision=older[4000]).commit == older[4000]  # an operator may


@pytest.mark.parametrize(
    ("name", "claim", "error"),
    [("adapter_model.safetensors", 1 << 40, FailedPrecondition), ("adapter_config.json", 5, DataLoss)],
)
def test_a_wrong_list_is_not_kept(hub: FaultyHub, publish, fetch, name: str, claim: int, error: Any) -> None:
    publish(ADAPTER)
    hub.claims[name] = claim
    with pytest.raises(error, match=name):
        fetch(bounds=bounds())
    hub.claims.clear()
    assert contents(fetch(bounds=bounds())) == ADAPTER


# A Hub that fails.


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
    with pytest.raises((NotFound, DataLoss), match=needed):
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


# Folders of a repository.

FOLDERS = {
    **{f"adapter/{name}": data for name, data in ADAPTER.items()},
    "checkpoints/checkpoint-430/adapter_config.json": b'{"r": 4}',
    "checkpoints/checkpoint-430/adapter_model.safetensors": b"weights of a checkpoint",
    "checkpoints/checkpoint-430/optimizer.pt": b"pickle",
    "checkpoints/checkpoint-430/deeper/tokenizer.json": b"{}",
    "tokenizer.json": b"[]",
}


@pytest.mark.parametrize("how", [{}, {"bounds": True}], ids=["operator", "caller"])
def test_a_folder_of_a_repository_is_fetched_beside_others(hub: FaultyHub, publish, fetch, how: dict) -> None:
    commit = publish(FOLDERS)
    if how:
        how = {"bounds": bounds()}
    found = fetch("org/name/checkpoints/checkpoint-430", "main", **how)
    assert contents(found) == {
        "adapter_config.json": b'{"r": 4}',
        "adapter_model.safetensors": b"weights of a checkpoint",
    }
    assert (found.repository, found.subfolder, found.commit) == (REPOSITORY, "checkpoints/checkpoint-430", commit)
    resolved = [asked.path.partition("/resolve/")[2].partition("/")[2] for asked in hub.asked if asked.method == "GET"]
    assert sorted(filter(None, resolved)) == [
        f"checkpoints/checkpoint-430/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert contents(fetch("org/name/adapter", **how)) == ADAPTER
    hub.close()
    assert fetch(found.source, commit) == found
    assert found.cached == found.folder.parents[3]


def test_a_repository_says_which_of_its_folders_have_an_adapter(publish, fetch) -> None:
    publish(FOLDERS)
    for source in (REPOSITORY, "org/name/checkpoints", "org/name/nothing"):
        with pytest.raises(NotFound, match=r"these have one: org/name/adapter, org/name/checkpoints/checkpoint-430$"):
            fetch(source)


def test_bounds_are_of_the_folder_that_is_wanted(hub: FaultyHub, publish, fetch) -> None:
    publish(
        {**FOLDERS, "checkpoints/checkpoint-430/tokenizer.json": bytes(KIB + 1), "adapter_config.json": bytes(KIB + 1)}
    )
    with pytest.raises(FailedPrecondition, match=r"checkpoint-430/tokenizer\.json: \d+ bytes"):
        fetch("org/name/checkpoints/checkpoint-430", bounds=bounds())
    with pytest.raises(FailedPrecondition, match=r"^adapter_config\.json: \d+ bytes"):
        fetch(bounds=bounds())
    assert contents(fetch("org/name/adapter", bounds=bounds())) == ADAPTER
    publish({**FOLDERS, "adapter/adapter_model.safetensors": bytes(KIB + 1)})
    with pytest.raises(FailedPrecondition, match=r"adapter/adapter_model\.safetensors: \d+ bytes"):
        fetch("org/name/adapter", bounds=bounds())


def test_a_folder_is_of_adapters_alone(hub: FaultyHub, fetch) -> None:
    with pytest.raises(InvalidArgument, match="repository"):
        fetch("org/name/base", kind="base")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("patterns", "permits"),
    [
        (["org/name"], True),
        (["org/*"], True),
        (["*"], True),
        (["org/name/adapter"], True),
        (["org/name/*"], True),
        (["org/name/check*"], False),
        (["org/*-adapters"], False),
        (["*/adapter"], False),
        (["other/*/adapter"], False),
    ],
    ids=str,
)
def test_the_allow_list_decides_of_folders_by_their_repository(patterns: list[str], permits: bool) -> None:
    with nullcontext() if permits else pytest.raises(PermissionDenied, match="org/name/adapter"):
        check_allowed("org/name/adapter", patterns)
    with pytest.raises(InvalidArgument, match="repository"):
        check_allowed("org/name/../adapter", patterns)


# Names and folders.


@pytest.mark.parametrize(
    "source",
    [
        "",
        "a//b",
        "a/b/",
        "a/b//c",
        "a/b/..",
        "a/b/c/../d",
        "a/b/./c",
        "a/b/*",
        "a/b/[c]",
        "a/b/c\\d",
        "org/..",
        "org/a..b",
        "org/-name",
        "org/na me",
        "a" * 97,
        "x\n",
    ],
)
def test_malformed_repository_is_refused_without_a_request(hub: FaultyHub, fetch, source: str) -> None:
    with pytest.raises(InvalidArgument, match="repository"):
        fetch(source)
    assert hub.asked == []


def test_allow_list_decides_by_pattern_and_asks_nobody(hub: FaultyHub) -> None:
    check_allowed("org/name", ["other/*", "org/*"])
    check_allowed("org/name", ["org/name"])
    for repository, patterns in [("org/name", []), ("org/name", ["other/*"]), ("org2/name", ["org/*"])]:
        with pytest.raises(PermissionDenied, match=repository):
            check_allowed(repository, patterns)
    for repository in ("/etc", "../name", "./name", "~/name", "org/../name", "name/"):
        with pytest.raises(InvalidArgument, match="repository"):
            check_allowed(repository, ["*"])
    assert hub.asked == []


def test_folder_is_local_and_has_no_revision(hub: FaultyHub, fetch, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", ADAPTER)
    assert fetch(str(folder)) == Snapshot(folder, str(folder), LOCAL)
    with pytest.raises(InvalidArgument, match="revision"):
        fetch(str(folder), revision="main")
    with pytest.raises(NotFound, match="no such folder"):
        fetch(str(tmp_path / "none"))
    assert hub.asked == []


def test_existing_folder_goes_before_a_repository_for_a_base_alone(
    publish, fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = publish(ADAPTER)
    folder = write(tmp_path / REPOSITORY, BASE)
    monkeypatch.chdir(tmp_path)
    assert fetch(kind="base") == Snapshot(folder, str(folder), LOCAL)
    assert fetch(kind="adapter").commit == commit
    write(folder, ADAPTER)
    assert fetch(f"./{REPOSITORY}") == Snapshot(folder, str(folder), LOCAL)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "other/file", "other"])
@pytest.mark.parametrize("absolute", [True, False])
def test_link_out_of_an_adapter_folder_is_refused(fetch, tmp_path: Path, name: str, absolute: bool) -> None:
    secret = write(tmp_path, {"secret": b"secret"}) / "secret"
    link = write(tmp_path / "adapter", ADAPTER) / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret if absolute else os.path.relpath(secret, link.parent))
    with pytest.raises(InvalidArgument, match=name):
        fetch(str(tmp_path / "adapter"))


def test_link_within_an_adapter_folder_is_followed(fetch, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", {**ADAPTER, "kept/weights": b"kept"})
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("kept/weights")
    (folder / "loop").symlink_to("loop")
    assert (fetch(str(folder)).folder / "adapter_model.safetensors").read_bytes() == b"kept"


def test_folder_of_the_hub_cache_may_link_to_its_blobs(publish, fetch) -> None:
    publish(ADAPTER)
    folder = fetch().folder
    assert (folder / "adapter_config.json").is_symlink()
    assert fetch(str(folder)).commit == LOCAL


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
