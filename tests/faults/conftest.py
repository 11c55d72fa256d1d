"""One server into which faults are injected, and the checks that hold after each fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from lorarep.v1 import adapters_pb2

from tests.server.conftest import world
from tests.support.callers import Bystander
from tests.support.failpoints import Failpoints
from tests.support.servers import Server, serving, wait_for
from tests.support.world import World

__all__ = ["world"]


def held(server: Server) -> dict[str, Any]:
    """The resources that a server holds: a fault must leave none of them behind."""
    samples = server.metrics()
    adapters = server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters
    process = psutil.Process(server.process.pid)
    return {
        "pages": samples["lorarep_kv_pages_used"],
        "requests": samples["lorarep_requests_running"] + samples["lorarep_requests_waiting"],
        "adapters": sorted(a.name for a in adapters),
        "references": sum(a.references for a in adapters),
        "leaving": [name for name in samples if "(leaving)" in name],
        "files": sorted(file.path for file in process.open_files()),
        "descriptors": process.num_fds(),
    }


@contextmanager
def nothing_left(server: Server, failpoints: Failpoints) -> Iterator[Bystander]:
    """The leak check of every fault test, and the caller whose streams run beside the fault."""
    server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())  # opens the channel's connection
    before = held(server)
    assert (before["pages"], before["requests"], before["references"]) == (0, 0, 0)
    bystander = Bystander(server)
    try:
        yield bystander
    finally:
        failpoints.clear()
        bystander.end()
    latest = {}

    def clean() -> bool:
        latest.update(held(server))
        # Fewer descriptors are no leak: a connection of an earlier test may have closed meanwhile.
        return {**latest, "descriptors": 0} == {**before, "descriptors": 0} and (
            latest["descriptors"] <= before["descriptors"]
        )

    try:
        wait_for(clean, "everything to be back")
    except AssertionError:
        assert latest == before
        raise


def assert_nothing_left_at_the_end(server: Server) -> None:
    """Asserts by its log that a server that has ended held no pages."""
    assert server.process.poll() is not None
    wait_for(lambda: any("ended: no call holds pages" in line for line in server.log), "the last line of the log")


@pytest.fixture(scope="session")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
    """The failpoints of `server`."""
    return Failpoints(tmp_path_factory.mktemp("faults") / "failpoints")


@pytest.fixture(scope="session")
def server(world: World, failpoints: Failpoints) -> Iterator[Server]:
    """A server with the adapters lora and dora loaded, and org/* allowed."""
    flags = [*world.flags(), "--allow-repository=org/*", "--adapter=lora=org/lora", "--adapter=dora=org/dora"]
    limits = ["--max-sequences=8", "--max-queued=64", "--log-level=debug"]
    with serving([*flags, *limits], {**world.env, **failpoints.env}) as server:
        yield server.wait_ready()


@pytest.fixture
def bystander(server: Server, failpoints: Failpoints) -> Iterator[Bystander]:
    """For every test of a fault: checks that the fault leaves nothing behind, and that another caller sees nothing."""
    with nothing_left(server, failpoints) as bystander:
        yield bystander


@pytest.fixture
def own_cache(world: World, server: Server, tmp_path: Path) -> Path:
    """A copy of the Hub cache, with the base and the adapters that the server has loaded."""
    return Path(shutil.copytree(world.cache, tmp_path / "cache", symlinks=True))
