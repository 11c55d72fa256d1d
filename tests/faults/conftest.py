"""One server that faults happen to, and what is true after each of them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from lorarep.v1 import adapters_pb2

from tests.server.conftest import ADAPTERS, World, world
from tests.support.servers import SECONDS, Server, request, serving, stream, wait_for

__all__ = ["ADAPTERS", "world"]

HUB_SECONDS = 4
"""Patience of the servers here with their Hub."""


class Failpoints:
    """The folder that servers are told to read."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.env = {"LORAREP_FAILPOINTS": str(folder), "HF_HUB_DOWNLOAD_TIMEOUT": str(HUB_SECONDS)}

    def set(self, name: str, action: str) -> None:
        (self._folder / f"{name}.reached").unlink(missing_ok=True)
        # Renamed into its place: nobody reads half an action.
        new = self._folder / f"{name}.new"
        new.write_text(action)
        new.rename(self._folder / name)

    def wait_reached(self, name: str) -> None:
        wait_for((self._folder / f"{name}.reached").exists, f"the failpoint {name}")

    def unset(self, name: str) -> None:
        (self._folder / name).unlink()

    def clear(self) -> None:
        for file in self._folder.iterdir():
            file.unlink(missing_ok=True)  # what acts once goes by itself


class Innocent:
    """Streams that run beside a fault, one after the other, with the same tokens each time."""

    WANTED = request("innocent", "dora", new_tokens=30)

    def __init__(self, server: Server) -> None:
        self._server = server
        self.may_end = False
        """Whether the fault may end a stream, as one in a step does to all in it; never with a wrong token before."""
        self.alone = self._tokens()
        self._over = threading.Event()
        self._wrong: list[str] = []
        self.whole = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _tokens(self) -> list[int]:
        tokens: list[int] = []
        try:
            for message in stream(self._server, self.WANTED, timeout=SECONDS):
                tokens += message.chunk.token_ids
        except grpc.RpcError:
            if not self.may_end or tokens != self.alone[: len(tokens)]:
                raise
        return tokens

    def _run(self) -> None:
        while not (self._wrong or (self._over.is_set() and self.whole)):
            try:
                tokens = self._tokens()
            except Exception as error:
                self._wrong.append(repr(error))
                return
            if len(tokens) == len(self.alone):
                self.whole += 1
            if tokens != self.alone[: len(tokens)] or (len(tokens) < len(self.alone) and not self.may_end):
                self._wrong.append(f"{tokens} in place of {self.alone}")

    def recover(self) -> None:
        """Waits for a whole stream; from then on none may end."""
        self.whole = 0
        wait_for(lambda: self.whole or self._wrong, "a whole stream")
        self.may_end = False

    def end(self) -> None:
        """Once a whole stream has run since."""
        self.whole = 0
        self._over.set()
        self._thread.join()
        assert self._wrong == []


def held(server: Server) -> dict[str, Any]:
    """All that a fault must not leave behind."""
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
def nothing_left(server: Server, failpoints: Failpoints) -> Iterator[Innocent]:
    """The leak check of every fault test, and the stream that runs beside."""
    server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())  # so that the channel's connection is there
    before = held(server)
    assert (before["pages"], before["requests"], before["references"]) == (0, 0, 0)
    innocent = Innocent(server)
    try:
        yield innocent
    finally:
        failpoints.clear()
        innocent.end()
    latest = {}

    def clean() -> bool:
        latest.update(held(server))
        # Fewer is no leak: a connection of an earlier test may have closed meanwhile.
        return {**latest, "descriptors": 0} == {**before, "descriptors": 0} and (
            latest["descriptors"] <= before["descriptors"]
        )

    try:
        wait_for(clean, "everything to be back")
    except AssertionError:
        assert latest == before
        raise


def assert_nothing_left_at_the_end(server: Server) -> None:
    """What a server that has ended can still be asked: its log."""
    assert server.process.poll() is not None
    wait_for(lambda: any("ended with 0 pages in use" in line for line in server.log), "the last line of the log")


@pytest.fixture(scope="session")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
    return Failpoints(tmp_path_factory.mktemp("faults") / "failpoints")


@pytest.fixture(scope="session")
def server(world: World, failpoints: Failpoints) -> Iterator[Server]:
    """With lora and dora loaded, and org/* allowed."""
    flags = [*world.flags(), "--allow-repository=org/*", "--adapter=lora=org/lora", "--adapter=dora=org/dora"]
    limits = ["--max-sequences=8", "--max-queued=64", "--log-level=debug"]
    with serving([*flags, *limits], {**world.env, **failpoints.env}) as server:
        yield server.wait_ready()


@pytest.fixture
def innocent(server: Server, failpoints: Failpoints) -> Iterator[Innocent]:
    """To be asked for by every test of a fault: nothing is left of it, and nobody else has noticed."""
    with nothing_left(server, failpoints) as innocent:
        yield innocent


@pytest.fixture
def own_cache(world: World, server: Server, tmp_path: Path) -> Path:
    """A copy of the cache, with the base and the adapters that the server has."""
    return Path(shutil.copytree(world.cache, tmp_path / "cache", symlinks=True))


def refused(call: Any, code: str, named: str = "") -> grpc.RpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    assert (error.value.code().name, named in error.value.details()) == (code, True), error.value.details()
    return error.value
