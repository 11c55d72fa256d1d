"""The adapters file of a server, mounted as Kubernetes mounts a ConfigMap."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lorarep.v1 import adapters_pb2 as pb
from lorarep_server.loading.adapters_file import DesiredAdapter, read_adapters

from lorarep_runtime.errors import InvalidArgument
from tests.support.callers import NOT_SERVING, adapters, health, load, refused, request, stream, unload
from tests.support.failpoints import Failpoints
from tests.support.models import save_adapter
from tests.support.servers import Server, lorarep, serving, wait_for
from tests.support.world import ADAPTERS, World

LOADING, LOADED, FAILED = pb.ADAPTER_STATE_LOADING, pb.ADAPTER_STATE_LOADED, pb.ADAPTER_STATE_FAILED
NAME = "adapters.yaml"


class ConfigMap:
    """A folder whose files are links through `..data`, a link that is replaced for each version."""

    def __init__(self, folder: Path, content: object) -> None:
        folder.mkdir()
        self._folder = folder
        self._version = 0
        self.file = folder / NAME
        self.file.symlink_to(Path("..data", NAME))
        self.write(content)

    def write(self, content: object) -> None:
        """Writes a new version of the file: text as it is, anything else as YAML."""
        self._version += 1
        version = self._folder / f"..{self._version}"
        version.mkdir()
        (version / NAME).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        aside = self._folder / "..data_tmp"
        aside.symlink_to(version.name)
        aside.rename(self._folder / "..data")


@dataclass(frozen=True)
class Follower:
    """A server that follows an adapters file."""

    server: Server
    map: ConfigMap
    failpoints: Failpoints

    def adapter(self, name: str) -> pb.Adapter:
        return self.server.adapters.GetAdapter(pb.GetAdapterRequest(name=name)).adapter

    def write(self, **entries: dict[str, Any]) -> None:
        self.map.write(entries)

    def wait(self, name: str, **fields: object) -> pb.Adapter:
        """Waits until an adapter satisfies a condition, and returns the adapter."""

        def found() -> pb.Adapter | None:
            adapter = adapters(self.server).get(name)
            is_so = adapter is not None and all(getattr(adapter, key) == value for key, value in fields.items())
            return adapter if is_so else None

        return wait_for(found, f"{name} to be {fields}")

    def wait_gone(self, *names: str) -> None:
        wait_for(lambda: not adapters(self.server).keys() & set(names), f"{names} to be gone")

    def states(self) -> dict[str, float]:
        samples = self.server.metrics()
        return {
            state: samples[f"lorarep_adapters_desired{{state={state}}}"] for state in ("loaded", "loading", "failed")
        }


@pytest.fixture(scope="module")
def module_follower(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Follower]:
    folder = tmp_path_factory.mktemp("followed")
    map, failpoints = ConfigMap(folder / "map", {}), Failpoints(folder / "failpoints")
    env = {**world.env, "LORAREP_FAILPOINTS": failpoints.env["LORAREP_FAILPOINTS"]}
    flags = [f"--adapters-file={map.file}", "--allow-repository=org/*", "--adapter=flag=org/plain"]
    with serving([*world.flags(), *flags], env) as server:
        yield Follower(server.wait_ready(), map, failpoints)


@pytest.fixture
def follower(module_follower: Follower) -> Iterator[Follower]:
    """A server whose adapters file is empty before and after each test."""
    yield module_follower
    module_follower.failpoints.clear()
    module_follower.write()
    wait_for(lambda: set(adapters(module_follower.server)) == {"flag"}, "the flag's adapter alone to be left")


@pytest.fixture
def moving(world: World, tmp_path: Path) -> str:
    """A repository whose branch can be moved."""
    name = f"org/{tmp_path.name[:60]}"
    world.hub.publish(name, save_adapter(world.base, tmp_path / "1", seed=21, **ADAPTERS["plain"]))
    return name


def move(world: World, repository: str, folder: Path) -> str:
    """Moves the branch, and returns the new commit."""
    return world.hub.publish(repository, save_adapter(world.base, folder, seed=22, **ADAPTERS["plain"]))


def test_what_is_new_is_loaded_and_what_has_left_unloaded(follower: Follower) -> None:
    server = follower.server
    load(server, "called", "org/plain")
    follower.write(lora={"repository": "org/lora", "pinned": True, "priority": 3}, deep={"repository": "org/dora"})
    follower.wait("lora", state=LOADED, pinned=True, priority=3, desired=True, error="")
    follower.wait("deep", state=LOADED, pinned=False, priority=0)
    assert follower.states() == {"loaded": 2, "loading": 0, "failed": 0}
    listed = lorarep("adapters", "list", f"--server={server.address}").stdout.splitlines()
    commit, size = follower.adapter("lora").commit[:12], follower.adapter("lora").bytes
    assert listed[0].split() == ["NAME", "FROM", "STATE", "TIER", "PINNED", "PRIORITY", "BYTES", "IN", "USE", "ERROR"]
    assert f"lora org/lora@{commit} loaded device pinned 3 {size} 0".split() in [line.split() for line in listed]
    assert not follower.adapter("called").desired
    assert len(server.generation.Generate(request("x", "lora")).token_ids) == 12
    refused(lambda: unload(server, "lora"), "FAILED_PRECONDITION", "adapters file")
    follower.map.write([{"name": "deep", "repository": "org/dora"}])  # a list instead of a mapping
    follower.wait_gone("lora")
    assert set(adapters(server)) == {"flag", "called", "deep"}
    unload(server, "called")


def test_a_changed_entry_replaces_and_a_moved_branch_does_not(
    follower: Follower, world: World, moving: str, tmp_path: Path
) -> None:
    server, first = follower.server, world.hub.repositories[moving].refs["main"]
    follower.write(moving={"repository": moving})
    follower.wait("moving", state=LOADED, commit=first)
    second = move(world, moving, tmp_path / "2")
    # Only pinning and priority have changed: the branch is not resolved again.
    follower.write(moving={"repository": moving, "priority": 1})
    follower.wait("moving", priority=1, commit=first)
    wanted = request("abc", "moving", new_tokens=100)
    alone = server.generation.Generate(wanted).token_ids
    follower.failpoints.set("step", "sleep 0.05")  # the stream must not end before the step is held
    call = stream(server, wanted)
    tokens = [*next(message for message in call if message.chunk.token_ids).chunk.token_ids]
    follower.failpoints.set("step", "hold")
    follower.write(moving={"repository": moving, "revision": second})
    follower.wait("moving", commit=second, references=0, priority=0)
    assert not call.done()
    follower.failpoints.unset("step")
    tokens += [token for message in call for token in message.chunk.token_ids]
    assert tokens == alone
    assert server.generation.Generate(wanted).token_ids != alone
    # An entry that cannot be loaded leaves the served adapter.
    follower.write(moving={"repository": "org/absent"})
    assert follower.wait("moving", commit=second, state=LOADED).desired
    wait_for(lambda: follower.adapter("moving").error.startswith("NOT_FOUND: "), "the error")
    assert follower.states()["failed"] == 1
    assert server.generation.Generate(wanted).token_ids != alone


def test_a_branch_is_followed_when_a_call_asks_for_it(
    follower: Follower, world: World, moving: str, tmp_path: Path
) -> None:
    server, first = follower.server, world.hub.repositories[moving].refs["main"]
    follower.write(moving={"repository": moving, "revision": "main", "priority": 2})
    follower.wait("moving", state=LOADED, commit=first)
    second = move(world, moving, tmp_path / "2")
    refused(lambda: load(server, "moving", moving, revision="main"), "ALREADY_EXISTS", first)
    for field, other in (("repository", "org/lora"), ("revision", first), ("priority", 1), ("stack", "base")):
        wanted = {"repository": moving, "revision": "main", field: other}
        refused(lambda wanted=wanted: load(server, "moving", **wanted, replace=True), "FAILED_PRECONDITION", field)
    ended = lorarep("adapters", "load", f"moving={moving}@main", "--replace", f"--server={server.address}")
    assert ended.returncode == 0, ended.stderr
    found = follower.adapter("moving")
    assert (found.commit, found.priority, found.desired) == (second, 2, True)


def test_what_was_loaded_otherwise_is_never_touched(follower: Follower) -> None:
    server = follower.server
    load(server, "mine", "org/plain", priority=7)
    follower.write(mine={"repository": "org/lora"}, flag={"repository": "org/plain", "pinned": True})
    for name in ("mine", "flag"):
        wait_for(lambda name=name: follower.adapter(name).error.startswith("ALREADY_EXISTS: "), "the error")
        found = follower.adapter(name)
        assert (found.repository, found.pinned, found.desired) == ("org/plain", False, False)
    assert follower.adapter("mine").priority == 7
    unload(server, "mine")
    follower.wait("mine", state=LOADED, repository="org/lora", error="", desired=True)
    follower.write()
    follower.wait_gone("mine")
    assert follower.wait("flag", state=LOADED, error="").repository == "org/plain"


def test_a_file_that_is_broken_or_gone_keeps_what_was_in_force(follower: Follower) -> None:
    follower.write(lora={"repository": "org/lora"})
    follower.wait("lora", state=LOADED)
    log = follower.server.log

    def complaints(what: str) -> int:
        return sum("stays in force" in line and what in line for line in log)

    for content, named in (("lora: {repository", "expected"), ({"lora": {"repo": "x"}}, "'lora': repo: "), ("", "{}")):
        follower.map.write(content)
        wait_for(lambda named=named: complaints(named), "the complaint")
    follower.map.file.unlink()
    wait_for(lambda: complaints("No such file"), "the complaint")
    assert set(adapters(follower.server)) == {"flag", "lora"}
    follower.map.file.symlink_to(Path("..data", NAME))
    follower.write(deep={"repository": "org/dora"})
    follower.wait_gone("lora")
    assert len([line for line in log if "stays in force" in line]) == 4


@pytest.mark.parametrize("stage", ["load-download", "load-compile"])
def test_an_entry_that_leaves_while_it_is_loaded_leaves_nothing(follower: Follower, moving: str, stage: str) -> None:
    server = follower.server
    cancelled = "lorarep_adapter_load_seconds_count{outcome=cancelled}{source=hub}"
    before = server.metrics().get(cancelled, 0)
    follower.failpoints.set(stage, "hold")
    follower.write(late={"repository": moving, "priority": 4})
    follower.failpoints.wait_reached(stage)
    found = follower.adapter("late")
    assert (found.state, found.repository, found.priority, found.desired) == (LOADING, moving, 4, True)
    assert follower.states() == {"loaded": 0, "loading": 1, "failed": 0}
    follower.write()
    follower.wait_gone("late")
    follower.failpoints.unset(stage)
    wait_for(lambda: server.metrics().get(cancelled, 0) == before + 1, "the load to end")


def test_failing_and_slow_entries_do_not_keep_the_server_from_starting(
    world: World, moving: str, tmp_path: Path
) -> None:
    map = ConfigMap(tmp_path / "map", {"fails": {"repository": moving}, "slow": {"repository": "org/lora"}})
    failpoints = Failpoints(tmp_path / "failpoints")
    failpoints.set("load-check", "hold")
    world.hub.faulty, world.hub.status = moving, 503
    try:
        with serving([*world.flags(), f"--adapters-file={map.file}"], {**world.env, **failpoints.env}) as server:
            follower = Follower(server, map, failpoints)
            failpoints.wait_reached("load-check")
            # The base is served, but readiness waits for a first attempt at each entry.
            wait_for(lambda: health(server, "") != NOT_SERVING, "the base")
            assert len(server.generation.Generate(request("x")).token_ids) == 12
            follower.wait("fails", state=FAILED)
            assert health(server, "readiness") == NOT_SERVING
            waits = server.generation.Generate.future(request("x", "slow"))
            assert follower.adapter("slow").state == LOADING
            failpoints.unset("load-check")
            assert len(waits.result().token_ids) == 12
            server.wait_ready()
            assert follower.adapter("fails").error.startswith("UNAVAILABLE: ")
            assert follower.states() == {"loaded": 1, "loading": 0, "failed": 1}
            listed = lorarep("adapters", "list", f"--server={server.address}").stdout
            assert re.search(rf"^fails +{moving} +failed +0 +0 +0 +UNAVAILABLE: ", listed, re.M)
            refused(lambda: server.generation.Generate(request("x", "fails")), "UNAVAILABLE", moving)
            world.hub.status = None
            follower.wait("fails", state=LOADED, error="")
            server.wait_logged(lambda line: "once more in" in line, "the log's line")
            assert len(server.generation.Generate(request("x", "fails")).token_ids) == 12
    finally:
        world.hub.faulty, world.hub.status = "", None


def test_a_file_that_is_broken_from_the_first_is_refused(world: World, tmp_path: Path) -> None:
    ports = ["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"]
    ended = lorarep("serve", *world.flags(), *ports, f"--adapters-file={tmp_path / 'absent'}", env=world.env)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (1, 1)
    assert "adapters_file: " in ended.stderr


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "neither a mapping of names nor a list"),
        ("text", "neither a mapping of names nor a list"),
        ("a: {repository: x/y", "while parsing"),
        ("a: {repository: x/y}\na: {repository: x/z}", "'a' is there twice"),
        ("a: {repository: x/y, repository: x/z}", "'repository' is there twice"),
        ("[{name: a, repository: x/y}, {name: a, repository: x/z}]", "'a' is named twice"),
        ("[{name: a, repository: x/y}, {repository: x/z}]", "entry 2: not a mapping with a name"),
        ("a: x/y", "'a': not a mapping with a repository"),
        ("a: {revision: main}", "'a': repository: is missing"),
        ("a: {repository: x y}", "'a': repository: 'x y' is not a repository id"),
        ("a: {repository: x/y, revison: main}", "'a': revison: is none of repository, revision, "),
        ("a: {repository: x/y, revision: 1234567}", "'a': revision: 1234567 has to be text"),
        ("a: {repository: x/y, revision:}", "'a': revision: None has to be text"),
        ("a: {repository: x/y, pinned: 1}", "'a': pinned: 1 has to be true or false"),
        ("a: {repository: x/y, priority: true}", "'a': priority: True has to be a whole number"),
        ("a: {repository: x/y, priority: 9999999999}", "'a': priority: 9999999999 is not within 32 bits"),
        ("'a,b': {repository: x/y}", "'a,b': name: 'a,b' is not 1 to 256 printable characters"),
        ("1: {repository: x/y}", "1: name: has to be text"),
        ("a: {repository: x/y, priority: 2024-13-45}", "month must be in"),
        ("a: {repository: x/y, pinned: !!bool maybe}", "maybe"),
        ("!!map [a]", "adapters_file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_by_entry_and_key(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / NAME
    file.write_text(content)
    with pytest.raises(InvalidArgument, match=r"^adapters_file: ") as error:
        read_adapters(file)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_a_mapping_or_a_list(tmp_path: Path) -> None:
    file, entry = (
        tmp_path / NAME,
        {"repository": "x/y", "revision": "v1", "stack": "deep", "pinned": True, "priority": -1},
    )
    expected = {
        "a": DesiredAdapter("a", "x/y", "v1", "deep", pinned=True, priority=-1),
        "b": DesiredAdapter("b", "/folder"),
    }
    for content in (
        {"a": entry, "b": {"repository": "/folder"}},
        [{"name": "a", **entry}, {"name": "b", "repository": "/folder"}],
    ):
        file.write_text(yaml.safe_dump(content))
        assert read_adapters(file) == expected
    file.write_text("{}")
    assert read_adapters(file) == {}
