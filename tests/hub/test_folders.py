"""Folders of a repository, folders on this machine, and names of both."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from lorarep_runtime.hub.snapshot import LOCAL, Snapshot, check_allowed
from tests.support.hub_faults import FaultyHub
from tests.support.repositories import ADAPTER, BASE, KIB, REPOSITORY, bounds, contents, write

FOLDERS = {
    **{f"adapter/{name}": data for name, data in ADAPTER.items()},
    "checkpoints/checkpoint-430/adapter_config.json": b'{"r": 4}',
    "checkpoints/checkpoint-430/adapter_model.safetensors": b"weights of a checkpoint",
    "checkpoints/checkpoint-430/optimizer.pt": b"pickle",
    "checkpoints/checkpoint-430/deeper/tokenizer.json": b"{}",
    "tokenizer.json": b"[]",
}


@pytest.mark.parametrize("is_caller", [False, True], ids=["operator", "caller"])
def test_a_folder_of_a_repository_is_fetched_beside_others(hub: FaultyHub, publish, fetch, is_caller: bool) -> None:
    commit = publish(FOLDERS)
    how = {"bounds": bounds()} if is_caller else {}
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


def test_callers_are_told_of_no_folder_that_they_may_not_name(publish, fetch) -> None:
    publish(FOLDERS)
    allowed = bounds(allow=("org/name/adapter*",))
    with pytest.raises(NotFound, match=r"these have one: org/name/adapter$"):
        fetch("org/name/adapters", bounds=allowed)
    with pytest.raises(NotFound, match=r"has no adapter_model\.safetensors$"):
        fetch("org/name/nothing", bounds=bounds(allow=("org/name/nothing",)))


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
