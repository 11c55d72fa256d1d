"""The Hub cache within a budget: which repositories are deleted, and which never are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorarep_runtime.adapters import files
from lorarep_runtime.adapters.disk import DiskBudget
from lorarep_runtime.config import AdapterLimits
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.errors import DataLoss, Exhausted, FailedPrecondition
from lorarep_runtime.hub.snapshot import Snapshot, fetch
from tests.support.engines import engine_for, greedy
from tests.support.hub_faults import FaultyHub
from tests.support.models import save_adapter, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("disk") / "base")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    return {
        n: save_adapter(base, base.parent / n, seed=i, r=8, target_modules=["q_proj"]) for i, n in enumerate("abcde")
    }


def published(hub: FaultyHub, base: Path, folders: dict[str, Path]) -> int:
    """Bytes that an adapter takes on the disk."""
    hub.publish("org/base", base)
    for name, folder in folders.items():
        hub.publish(f"org/{name}", folder)
    return sum(path.stat().st_size for path in folders["a"].iterdir() if path.name != "README.md")


def cached(cache: Path) -> set[str]:
    return {path.name.rpartition("--")[2] for path in cache.glob("models--*")}


def answered(engine: Engine, name: str) -> tuple[int, ...]:
    return engine.generate([(greedy(new_tokens=6), engine.adapters.lease([(name, 1.0)]))])[0].tokens


def test_the_limit_may_be_filled_to_its_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = DiskBudget(tmp_path, 100, dict)
    monkeypatch.setattr(budget, "_trim", None)  # nothing has to leave
    with budget.staying("org/a") as a, budget.staying("org/b") as b:
        budget.expect(a, 60)
        budget.expect(b, 40)
        with pytest.raises(Exhausted, match="41 bytes of org/b"):
            budget.expect(b, 41)
    budget._held = {"org/old": 90}
    monkeypatch.setattr(budget, "_trim", lambda: budget._held.update({"org/old": 40}))
    with budget.staying("org/a") as a:
        budget.expect(a, 60)


def test_loads_of_one_repository_count_together_and_each_ends_its_own(tmp_path: Path) -> None:
    budget = DiskBudget(tmp_path, 100, dict)
    with budget.staying("org/a") as first:
        budget.expect(first, 60)
        with budget.staying("org/a") as second:
            with pytest.raises(Exhausted, match="60 bytes of org/a"):
                budget.expect(second, 60)
            budget.expect(second, 40)
        with budget.staying("org/b") as third, pytest.raises(Exhausted, match="41 bytes of org/b"):
            budget.expect(third, 41)
        with budget.staying("org/b") as third:
            budget.expect(third, 40)
    assert not budget._coming


def test_the_least_recently_used_leave_the_cache_and_come_back(
    hub: FaultyHub, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    size = published(hub, base, folders)
    alone = engine_for(base, adapters=folders)
    expected = {name: answered(alone, name) for name in folders}
    cache = tmp_path / "cache"
    fetch("org/base", None, kind="base", cache_dir=cache)
    fetch("org/e", None, kind="adapter", cache_dir=cache)  # of an earlier run: before all others
    limits = AdapterLimits(device_bytes=alone.adapters.get("a").bytes, disk_bytes=int(3.5 * size))
    engine = engine_for(base, cache_dir=cache, limits=limits)
    for name in "abc":
        engine.adapters.load(name, f"org/{name}", trusted=True)
    assert cached(cache) == {"base", "a", "b", "c"}
    assert answered(engine, "a") == expected["a"]
    engine.adapters.load("d", "org/d", trusted=True)
    assert cached(cache) == {"base", "a", "c", "d"}
    hub.asked.clear()
    waiting = engine.adapters.lease([("a", 1.0)])  # has to come from its file: that stays
    assert answered(engine, "b") == expected["b"]
    assert hub.downloads() == ["adapter_config.json", "adapter_model.safetensors"]
    assert cached(cache) == {"base", "a", "b", "d"}
    assert engine.generate([(greedy(new_tokens=6), waiting)])[0].tokens == expected["a"]
    assert {info.name for info in engine.adapters.list()} == set("abcd")


def test_of_two_folders_of_one_commit_the_unused_one_leaves(
    hub: FaultyHub, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """As of a repository that has been renamed, or whose name is written in another case."""
    size = published(hub, base, folders)
    hub.repositories["Org/a"] = hub.repositories["org/a"]
    for trial in range(4):  # one alone could succeed by chance
        cache = tmp_path / f"cache{trial}"
        engine = engine_for(base, cache_dir=cache, limits=AdapterLimits(disk_bytes=int(2.5 * size)))
        engine.adapters.load("old", "org/a", trusted=True)
        engine.adapters.unload("old")
        engine.adapters.load("new", "Org/a", trusted=True, pinned=True)
        engine.adapters.load("c", "org/c", trusted=True)
        assert {path.name for path in cache.glob("models--*")} == {"models--Org--a", "models--org--c"}


def test_what_somebody_is_looking_for_stays(
    hub: FaultyHub, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    size = published(hub, base, folders)
    engine = engine_for(base, cache_dir=tmp_path / "cache", limits=AdapterLimits(disk_bytes=int(1.5 * size)))
    disk = engine.adapters._files.disk
    assert disk is not None
    engine.adapters.load("a", "org/a", trusted=True)
    with disk.staying("org/a"):
        engine.adapters.load("b", "org/b", trusted=True)
        assert cached(tmp_path / "cache") == {"a", "b"}
    engine.adapters.load("c", "org/c", trusted=True)
    assert cached(tmp_path / "cache") == {"c"}


def test_files_of_a_mix_stay_while_requests_hold_it(
    hub: FaultyHub, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    size = published(hub, base, folders)
    engine = engine_for(base, cache_dir=tmp_path / "cache", limits=AdapterLimits(disk_bytes=int(2.5 * size)))
    for name in "ab":
        engine.adapters.load(name, f"org/{name}", trusted=True)
    lease = engine.adapters.lease([("a", 1.0), ("b", 0.5)])
    engine.adapters.load("c", "org/c", trusted=True)
    assert cached(tmp_path / "cache") == {"a", "b", "c"}
    lease.release()
    engine.adapters.load("d", "org/d", trusted=True)
    assert "d" in cached(tmp_path / "cache")
    assert len(cached(tmp_path / "cache")) == 2


def test_a_file_that_cannot_be_read_once_costs_one_request(
    hub: FaultyHub, base: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(hub, base, folders)
    limits = AdapterLimits(allow_repositories=("org/*",))
    engine = engine_for(base, cache_dir=tmp_path / "cache", limits=limits)

    def fails(file: int) -> str:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(files, "file_digest", fails)
        with pytest.raises(DataLoss, match="Input/output error"):
            engine.adapters.lease([("org/a", 1.0)])
    assert engine.adapters.list() == []
    assert answered(engine, "org/a") == answered(engine_for(base, adapters={"a": folders["a"]}), "a")


def test_a_name_whose_files_have_left_before_its_turn_finds_them_again(
    hub: FaultyHub, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    size = published(hub, base, folders)
    limits = AdapterLimits(disk_bytes=int(1.5 * size), allow_repositories=("org/*",))
    engine = engine_for(base, cache_dir=tmp_path / "cache", limits=limits)
    engine.adapters._register("org/a", None)  # for a request that left before it started
    for name in "bc":
        engine.adapters.load(name, f"org/{name}", trusted=True)
    assert "a" not in cached(tmp_path / "cache")
    assert answered(engine, "org/a") == answered(engine_for(base, adapters={"a": folders["a"]}), "a")


def test_a_cache_full_of_what_is_in_use_grows(
    hub: FaultyHub, base: Path, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = published(hub, base, folders)
    engine = engine_for(base, cache_dir=tmp_path / "cache", limits=AdapterLimits(disk_bytes=int(1.5 * size)))
    engine.adapters.load("a", "org/a", trusted=True, pinned=True)
    with caplog.at_level("WARNING"):
        engine.adapters.load("b", "org/b", trusted=True)
    assert "adapters in use" in caplog.text
    engine.adapters.load("c", "org/c", trusted=True)
    assert cached(tmp_path / "cache") == {"a", "c"}


def test_an_adapter_that_no_operator_named_may_send_what_its_config_needs_and_the_disk_holds(
    hub: FaultyHub, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    size = published(hub, base, folders)
    large = shutil.copytree(folders["a"], tmp_path / "large")
    config = json.loads((large / "adapter_config.json").read_text())
    (large / "adapter_config.json").write_text(json.dumps({**config, "r": 1}))
    with (large / "adapter_model.safetensors").open("ab") as weights:
        weights.write(bytes(200_000))
    hub.publish("org/large", large)
    cache = tmp_path / "cache"
    limits = AdapterLimits(disk_bytes=int(1.5 * size), allow_repositories=("org/*",))
    engine = engine_for(base, cache_dir=cache, limits=limits)
    with pytest.raises(FailedPrecondition, match=r"adapter_model\.safetensors: \d+ bytes are over"):
        engine.adapters.load("large", "org/large")
    assert "adapter_model.safetensors" not in hub.downloads()
    engine.adapters.load("a", "org/a", pinned=True)
    hub.asked.clear()
    with pytest.raises(Exhausted, match="no room"):
        engine.adapters.load("b", "org/b")
    assert "adapter_model.safetensors" not in hub.downloads()
    engine.adapters.unload("a")
    engine.adapters.load("b", "org/b")
    assert "a" not in cached(cache)
    assert engine.adapters._files.disk is not None
    assert not engine.adapters._files.disk._coming


def test_a_part_that_another_download_renames_costs_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = DiskBudget(tmp_path, 1000, dict)
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    for name in ("kept", "part.incomplete"):
        (blobs / name).write_bytes(bytes(100))
    listed = list(blobs.iterdir())
    (blobs / "part.incomplete").unlink()
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(listed))
    with disk.staying("org/a") as load:
        disk.added(load, Snapshot(folder, "org/a", "0"))
    assert disk._held == {"org/a": 100}
