"""Callers of loads: they share a load, wait in the queue, and leave."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fmaas import generation_pb2 as fmaas_pb2
from lorarep.v1 import adapters_pb2 as pb
from lorarep.v1 import generation_pb2 as pb2

from tests.support.callers import Bystander, adapters, load, loading, refused, request, stream, unload
from tests.support.failpoints import Failpoints
from tests.support.models import save_adapter
from tests.support.servers import SECONDS, OnTerminal, Server, wait_for
from tests.support.world import ADAPTERS, World

WEIGHTS = "adapter_model.safetensors"
AT_A_TIME, MOST = 8, 72
STAGES = {
    pb.LOAD_STAGE_DOWNLOADING: "load-download",
    pb.LOAD_STAGE_CHECKING: "load-check",
    pb.LOAD_STAGE_COMPILING: "load-compile",
}
"""The stages of a load, and the failpoint of each."""


@pytest.fixture
def new(world: World, tmp_path: Path) -> str:
    """A new repository, which is in no cache."""
    name = f"org/{tmp_path.name[:60]}"
    world.hub.publish(name, save_adapter(world.base, tmp_path / "new", seed=5, **ADAPTERS["plain"]))
    return name


def until(call: Any, stage: int) -> pb.LoadProgress:
    return next(message.progress for message in call if message.progress.stage == stage)


def ended(server: Server, outcome: str) -> float:
    """The number of loads that ended with this outcome."""
    return server.metrics().get(f"lorarep_adapter_load_seconds_count{{outcome={outcome}}}{{source=hub}}", 0)


def leave(server: Server, *calls: Any) -> None:
    """Cancels calls, and waits until the server has noticed."""

    def noticed() -> int:
        return sum(" CANCELLED " in line for line in server.log)

    before = noticed()
    for call in calls:
        call.cancel()
    wait_for(lambda: noticed() >= before + len(calls), "the callers to have left")


def test_every_stage_of_a_load_is_told(server: Server, bystander: Bystander, failpoints: Failpoints, new: str) -> None:
    for failpoint in STAGES.values():
        failpoints.set(failpoint, "hold")
    seen = []
    for message in loading(server, "new", new):
        at = message.progress
        seen.append((at.stage, 0 < at.done <= at.total))
        if at.stage in STAGES:
            failpoints.unset(STAGES[at.stage])
    assert message.adapter.name == "new"
    downloading = [counted for stage, counted in seen if stage == pb.LOAD_STAGE_DOWNLOADING]
    assert downloading
    assert all(downloading)
    assert (pb.LOAD_STAGE_CHECKING, False) in seen
    assert (pb.LOAD_STAGE_COMPILING, True) in seen
    assert [stage for stage, _ in seen[:-1]] == sorted(stage for stage, _ in seen[:-1])
    unload(server, "new")


def test_callers_share_a_load_that_goes_on_while_one_of_them_waits(
    server: Server, world: World, bystander: Bystander, failpoints: Failpoints, new: str
) -> None:
    world.hub.asked.clear()
    before = {outcome: ended(server, outcome) for outcome in ("ok", "cancelled")}
    failpoints.set("load-download", "hold")
    generating = stream(server, request("x", new))
    failpoints.wait_reached("load-download")
    first, second = loading(server, new, new), loading(server, new, new)
    for call in (first, second):
        # The request started the load, so it has reached this stage.
        assert next(call).progress.stage == pb.LOAD_STAGE_DOWNLOADING
    leave(server, generating, first)
    failpoints.unset("load-download")
    *_, last = second
    assert last.adapter.name == new
    assert world.hub.downloads().count(WEIGHTS) == 1
    assert {outcome: ended(server, outcome) - before[outcome] for outcome in before} == {"ok": 1, "cancelled": 0}
    unload(server, new)


@pytest.mark.parametrize("first", ["LoadAdapter", "GenerateStream"])
def test_a_request_leaves_an_administrators_pin_and_priority(
    server: Server, bystander: Bystander, failpoints: Failpoints, new: str, first: str
) -> None:
    """Whoever begins the load, and whoever joins it."""
    begin = [lambda: loading(server, new, new, pinned=True, priority=7), lambda: stream(server, request("x", new))]
    if first == "GenerateStream":
        begin.reverse()
    failpoints.set("load-check", "hold")
    calls = [begin[0]()]
    failpoints.wait_reached("load-check")
    calls.append(begin[1]())
    failpoints.unset("load-check")
    for call in calls:
        list(call)
    found = adapters(server)[new]
    assert (found.pinned, found.priority) == (True, 7)
    assert load(server, new, new).pinned  # who says nothing about it changes nothing
    unload(server, new)


@pytest.mark.parametrize(
    ("wanted", "code", "named"),
    [
        (lambda new: request("x", *(f"{new}@{i}" for i in range(20))), "INVALID_ARGUMENT", "adapters: "),
        (
            lambda new: request("x", adapters=[pb2.AdapterRef(name=new, weight=math.nan)]),
            "INVALID_ARGUMENT",
            "adapters: ",
        ),
        (lambda new: request("x", new, sampling=pb2.Sampling(temperature=math.nan)), "INVALID_ARGUMENT", "temperature"),
        (lambda new: request("x", new, new_tokens=10**6), "INVALID_ARGUMENT", "max_new_tokens: "),
        (lambda new: request("x", new, stopping=pb2.Stopping(stop=["x"] * 17)), "INVALID_ARGUMENT", "stop: "),
        (lambda new: request("x", new, stack="nowhere"), "NOT_FOUND", "stack: "),
        (lambda new: request("x", new, logprobs=21), "INVALID_ARGUMENT", "logprobs: "),
        (lambda new: request("x", new, prompt=pb2.Prompt()), "INVALID_ARGUMENT", "prompt: "),
    ],
    ids=["adapters", "weight", "temperature", "max_new_tokens", "stop", "stack", "logprobs", "prompt"],
)
def test_a_request_that_is_refused_has_loaded_nothing(
    server: Server,
    world: World,
    bystander: Bystander,
    new: str,
    wanted: Callable[[str], pb2.GenerateRequest],
    code: str,
    named: str,
) -> None:
    world.hub.asked.clear()
    refused(lambda: server.generation.Generate(wanted(new), timeout=SECONDS), code, named)
    assert not world.hub.asked
    assert not [name for name in adapters(server) if name.startswith(new)]


def test_tokenizing_brings_no_weights_to_the_device(server: Server, bystander: Bystander, new: str) -> None:
    adapter = pb2.AdapterRef(name=new)
    wanted = pb2.TokenizeRequest(prompt=pb2.Prompt(text="abc"), adapters=[adapter, pb2.AdapterRef(name="org/plain")])
    batch = fmaas_pb2.BatchedTokenizeRequest(requests=[fmaas_pb2.TokenizeRequest(text="abc")], adapter_id=new)
    assert len(server.generation.Tokenize(wanted, timeout=SECONDS).token_ids) == 3
    assert server.fmaas.Tokenize(batch, timeout=SECONDS).responses[0].token_count == 3
    for name in (new, "org/plain"):
        assert adapters(server)[name].tier == pb.ADAPTER_TIER_DISK
    assert not any("mixes" in name for name in server.metrics())
    list(stream(server, request("x", new)))
    assert adapters(server)[new].tier == pb.ADAPTER_TIER_DEVICE
    for name in (new, "org/plain"):
        unload(server, name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("asks", ["LoadAdapter", "GenerateStream"])
def test_a_load_that_all_callers_have_left_is_cancelled_and_leaves_nothing(
    server: Server, world: World, bystander: Bystander, failpoints: Failpoints, new: str, stage: int, asks: str
) -> None:
    before = ended(server, "cancelled")
    failpoints.set(STAGES[stage], "hold")
    call = loading(server, new, new) if asks == "LoadAdapter" else stream(server, request("x", new))
    failpoints.wait_reached(STAGES[stage])
    leave(server, call)
    failpoints.unset(STAGES[stage])
    wait_for(lambda: ended(server, "cancelled") == before + 1, "the load to end")
    assert new not in adapters(server)
    cached = world.cache / f"models--{new.replace('/', '--')}"
    assert not list(cached.rglob("*.incomplete"))
    if stage == pb.LOAD_STAGE_DOWNLOADING:
        assert len(list(cached.glob("blobs/*"))) <= 1  # the other one of the two files
    assert load(server, new, new).name == new
    unload(server, new)


def test_loads_wait_their_turn_and_one_too_many_is_refused_with_a_hint(
    server: Server, bystander: Bystander, failpoints: Failpoints
) -> None:
    failpoints.set("load-check", "hold")
    calls = [loading(server, f"held{i}", "org/plain") for i in range(AT_A_TIME)]
    for call in calls:
        until(call, pb.LOAD_STAGE_CHECKING)
    calls += [loading(server, f"waits{i}", "org/plain") for i in range(MOST - AT_A_TIME)]
    for call in calls[AT_A_TIME:]:
        assert next(call).progress == pb.LoadProgress(stage=pb.LOAD_STAGE_WAITING)
    error = refused(lambda: load(server, "over", "org/plain"), "RESOURCE_EXHAUSTED", f"loads: {MOST}")
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    leave(server, calls.pop())  # frees a place at once, although the threads are held
    calls.append(loading(server, "again", "org/plain"))
    assert next(calls[-1]).HasField("progress")
    before = ended(server, "cancelled")
    leave(server, *reversed(calls[1:]))  # those that wait first, or some would begin in the place of others
    failpoints.unset("load-check")
    *_, last = calls[0]
    assert last.adapter.name == "held0"
    wait_for(lambda: ended(server, "cancelled") == before + AT_A_TIME - 1, "the others that had begun to end")
    unload(server, "held0")


def test_the_command_line_shows_a_loads_progress(
    server: Server, bystander: Bystander, failpoints: Failpoints, new: str
) -> None:
    for name in ("load-download", "load-compile"):
        failpoints.set(name, "hold")
    command = OnTerminal("adapters", "load", f"new={new}", f"--server={server.address}")
    wait_for(lambda: "downloading: " in command.shown, "the download to be shown")
    failpoints.unset("load-download")
    wait_for(lambda: "compiling: " in command.shown, "the compilation to be shown")
    failpoints.unset("load-compile")
    assert command.wait() == 0, command.shown
    for stage in ("downloading", "compiling"):
        assert f"{stage}: 100%" in command.shown, command.shown
    unload(server, "new")
