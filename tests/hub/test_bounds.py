"""What repositories may send that no operator has named: commits, files and sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorarep_runtime.errors import DataLoss, FailedPrecondition, NotFound, PermissionDenied
from tests.support.hub_faults import FaultyHub
from tests.support.repositories import ADAPTER, KIB, REPOSITORY, bounds, contents


class AnyLook:
    """A look that any adapter passes."""

    def config(self, folder: Path) -> int:
        return KIB

    def header(self, file: Path) -> None:
        pass


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


def test_weights_without_a_config_are_not_found_and_never_asked_for(hub: FaultyHub, publish, fetch) -> None:
    """Nothing says how large they may be, and the budget of the disk counts repositories with a config alone."""
    bare = {"adapter_model.safetensors": bytes(KIB + 1), "deep/adapter_model.safetensors": bytes(KIB + 1)}
    publish(bare)
    for source in (REPOSITORY, f"{REPOSITORY}/deep"):
        for how in ({"bounds": bounds()}, {"look": AnyLook()}, {"bounds": bounds(), "look": AnyLook()}):
            with pytest.raises(NotFound, match=rf"^{source}: has no adapter_config\.json$"):
                fetch(source, **how)
    assert hub.downloads() == []
    publish({**bare, "deep/adapter_config.json": b"{}"})
    with pytest.raises(NotFound, match=r"has no adapter_config\.json; these have one: org/name/deep$"):
        fetch(bounds=bounds())


def test_of_a_pull_request_that_an_operator_has_fetched_callers_reach_that_part_alone(
    hub: FaultyHub, publish, fetch
) -> None:
    publish(ADAPTER)
    foreign = publish({f"{folder}/{name}": ADAPTER[name] for folder in "ab" for name in ADAPTER}, branch="refs/pr/1")
    fetch("org/name/a", "refs/pr/1")
    hub.asked.clear()
    with pytest.raises(PermissionDenied, match="revision"):
        fetch("org/name/b", foreign, bounds=bounds())
    assert hub.downloads() == []
    assert fetch("org/name/a", foreign, bounds=bounds()).commit == foreign


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
