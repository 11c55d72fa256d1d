"""Connections without end: from one address, to one port, with as few open files as services start with."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import resource
import select
import socket
import urllib.parse
from collections.abc import Iterator

import grpc
import psutil
import pytest
from lorarep_server import ports
from lorarep_server.config import ServerConfig
from lorarep_server.connections import MOST_DESCRIPTORS, ConnectionLimit
from lorarep_server.demo.voices import BASE, MODELS
from lorarep_server.ports import PortLimits

from lorarep_runtime.errors import InvalidArgument
from tests.support.callers import SERVING, health
from tests.support.servers import SECONDS, Server, serving, wait_for

SOFT_LIMIT = 1024
"""Open files with which service managers and container runtimes start a process."""
FIRST, SECOND = "127.0.0.1", "127.0.0.2"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that was started with SOFT_LIMIT."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT_LIMIT, before[1]))
    try:
        context = serving([f"--base={MODELS / BASE}", "--kv-bytes=16MiB", "--openai-listen=127.0.0.1:0"])
        server = context.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with contextlib.ExitStack() as stack:
        stack.push(context)
        yield server.wait_ready()


@contextlib.contextmanager
def connected(port: int, count: int, address: str = FIRST) -> Iterator[list[socket.socket]]:
    """So many connections to a port, which say nothing."""
    with contextlib.ExitStack() as stack:
        source = (address, 0)
        yield [
            stack.enter_context(socket.create_connection((FIRST, port), SECONDS, source_address=source))
            for _ in range(count)
        ]


def closed(connections: list[socket.socket]) -> int:
    """How many connections the other side has closed."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return len(poll.poll(0))


def status(port: int, path: str, address: str) -> int:
    """The status of a request over a new connection from an address."""
    connection = http.client.HTTPConnection(FIRST, port, SECONDS, source_address=(address, 0))
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


@pytest.mark.parametrize(("name", "path", "most"), [("openai", "/v1/models", 512), ("metrics", "/metrics", 64)])
def test_one_address_leaves_connections_to_others(server: Server, name: str, path: str, most: int) -> None:
    port = server.openai_port if name == "openai" else urllib.parse.urlsplit(server.metrics_url).port
    with connected(port, most) as connections:
        wait_for(lambda: closed(connections) == most // 2, "those too many to be closed", 60)
        assert status(port, path, SECOND) == 200
    wait_for(lambda: health(server, "liveness") == SERVING, "the server")


def test_a_port_of_grpc_has_more_connections_than_a_service_starts_with(server: Server) -> None:
    soft, hard = psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    assert soft == min(hard, MOST_DESCRIPTORS) > SOFT_LIMIT
    with connected(int(server.address.rpartition(":")[2]), SOFT_LIMIT + 100):
        with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            grpc.channel_ready_future(channel).result(60)
        assert status(server.openai_port, "/v1/models", FIRST) == 200


def test_a_port_of_grpc_bounds_its_connections_and_their_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = {name: value // 20 if name.endswith("_timeout_ms") else value for name, value in ports.GRPC_OPTIONS}
    monkeypatch.setattr(ports, "GRPC_OPTIONS", tuple(faster.items()))

    async def serve() -> None:
        server = grpc.aio.server(options=ports._grpc_options(3))
        port = server.add_insecure_port(f"{FIRST}:0")
        await server.start()
        with connected(port, 5) as connections:
            await asyncio.to_thread(wait_for, lambda: closed_by_end(connections) == 2, "those too many to be closed")
            await asyncio.to_thread(wait_for, lambda: closed_by_end(connections) == 5, "the silent to be closed")
        await server.stop(None)

    asyncio.run(serve())


def closed_by_end(connections: list[socket.socket]) -> int:
    """How many connections the other side has closed; it may have said something before."""
    for connection in connections:
        connection.settimeout(0.01)
    return sum(map(_is_closed, connections))


def _is_closed(connection: socket.socket) -> bool:
    try:
        while connection.recv(1 << 12):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_the_limits_leave_descriptors_to_files() -> None:
    for descriptors in (64, 1024, MOST_DESCRIPTORS):
        limits = PortLimits.within(descriptors, ServerConfig())
        assert limits.grpc + limits.openai + 2 * limits.small <= 3 * descriptors / 4
    assert PortLimits.within(MOST_DESCRIPTORS, ServerConfig()).openai == 512
    assert PortLimits.within(MOST_DESCRIPTORS, ServerConfig(max_calls=100)).openai == 100
    behind_a_proxy = ServerConfig(max_connections=2000, max_connections_per_address=2000)
    assert PortLimits.within(MOST_DESCRIPTORS, behind_a_proxy).openai_per_address == 2000
    with pytest.raises(InvalidArgument, match=r"2000 connections need 8000 open files.*may have 4096") as error:
        PortLimits.within(4096, behind_a_proxy)
    assert error.value.field == "max_connections"


def test_a_network_of_ipv6_counts_as_one_address() -> None:
    limit = ConnectionLimit(10, 2)
    assert [limit.enter(f"2001:db8::{i}") for i in (1, 2, 3)] == [True, True, False]
    assert limit.enter("2001:db8:0:1::1")
    assert [limit.enter("fe80::1%eth0"), limit.enter("fe80::2%eth0"), limit.enter("fe80::3")] == [True, True, False]
    assert [limit.enter(f"::ffff:10.0.0.{i}") for i in (1, 2, 3)] == [True, True, True]
    limit.leave("2001:db8::1")
    assert limit.enter("2001:db8::3")
