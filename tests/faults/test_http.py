"""Connections to HTTP ports that say nothing, half of something, or too much."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator

import psutil
import pytest
from aiohttp import ClientSession, web
from lorarep.v1 import generation_pb2
from lorarep_server.api import openai_bodies
from lorarep_server.connections import ConnectionLimit
from lorarep_server.http_port import HttpPort
from lorarep_server.ports import scraper
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorarep_runtime.errors import DeadlineExceeded
from tests.support.callers import Bystander, refused, request
from tests.support.servers import SECONDS, Server

HALF = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


def application(seconds: float = 0) -> web.Application:
    """Answers after so many seconds."""

    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(seconds)
        return web.Response(text="answer")

    app = web.Application()
    app.router.add_get("/", answer)
    return app


@contextlib.asynccontextmanager
async def opened(app: web.Application, **limits: float) -> AsyncIterator[HttpPort]:
    """An open port of an application, for two connections unless `connections` says another number."""
    most = int(limits.pop("connections", 2))
    port = HttpPort(app, ConnectionLimit(most, most), patience=1, **limits)
    await port.open("127.0.0.1:0", "metrics_listen")
    try:
        yield port
    finally:
        await port.close()


@contextlib.asynccontextmanager
async def connected(port: HttpPort) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a port, which is closed at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def until_open(port: HttpPort, count: int) -> None:
    """Waits until a port has so many connections."""
    server = port._runner.server
    assert server is not None
    while len(server.connections) != count:  # noqa: ASYNC110 (nothing tells)
        await asyncio.sleep(0.01)


def test_connections_without_a_whole_request_are_closed_and_slow_answers_arrive() -> None:
    async def ask() -> None:
        async with opened(application(seconds=1.5), connections=10, request_seconds=0.5) as port:
            for said in (b"", HALF):
                async with connected(port) as (reader, writer):
                    writer.write(said)
                    assert await asyncio.wait_for(reader.read(), SECONDS) == b""
            async with connected(port) as (reader, writer):
                writer.write(HALF + b"\r\n")
                # The connection stays until its next request is late, too.
                assert b"answer" in await asyncio.wait_for(reader.read(), SECONDS)

    asyncio.run(ask())


def test_a_connection_too_many_is_closed_at_once() -> None:
    async def ask() -> None:
        async with opened(application()) as port:
            async with connected(port), connected(port):
                await until_open(port, 2)
                async with connected(port) as (reader, _):
                    assert await asyncio.wait_for(reader.read(), SECONDS) == b""
            await until_open(port, 0)
            async with connected(port) as (reader, writer):
                writer.write(HALF + b"Connection: close\r\n\r\n")
                assert b"answer" in await asyncio.wait_for(reader.read(), SECONDS)

    asyncio.run(ask())


def test_a_body_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_bodies, "BODY_SECONDS", 0.2)
    ended: list[DeadlineExceeded] = []

    async def read(request: web.Request) -> web.Response:
        try:
            await openai_bodies._body(request, 1000)
        except DeadlineExceeded as error:
            ended.append(error)
        return web.Response()

    async def ask() -> None:
        app = web.Application()
        app.router.add_post("/", read)
        async with opened(app) as port, connected(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
            assert (await asyncio.wait_for(reader.readline(), SECONDS)).startswith(b"HTTP/1.1 200")

    asyncio.run(ask())
    assert [error.field for error in ended] == ["body"]


def test_half_requests_take_no_threads_of_the_port_of_metrics(server: Server, bystander: Bystander) -> None:
    process, url = psutil.Process(server.process.pid), urllib.parse.urlsplit(server.metrics_url)
    before = process.num_threads()
    with contextlib.ExitStack() as held:
        for _ in range(30):
            connection = held.enter_context(socket.create_connection((url.hostname, url.port), timeout=SECONDS))
            connection.sendall(HALF)
        assert server.metrics()["lorarep_kv_pages"] > 0
        assert process.num_threads() < before + 25


def test_a_request_longer_than_any_prompt_needs_is_refused_before_it_is_parsed(
    server: Server, bystander: Bystander
) -> None:
    wanted = request([5] * (1 << 20))
    refused(lambda: server.generation.Generate(wanted, timeout=SECONDS), "INVALID_ARGUMENT", "request: ")
    tokenize = generation_pb2.TokenizeRequest(prompt=wanted.prompt)
    refused(lambda: server.generation.Tokenize(tokenize, timeout=SECONDS), "INVALID_ARGUMENT", "request: ")


class Busy(Collector):
    """Takes a processor so many seconds, and counts how often."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.times = 0

    def collect(self) -> Iterator[Metric]:
        self.times += 1
        until = time.thread_time() + self._seconds
        while time.thread_time() < until:
            pass
        yield GaugeMetricFamily("times", "How often.", self.times)


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 8), (0.15, 1)])
def test_metrics_that_take_long_are_collected_once_in_a_while(seconds: float, times: int) -> None:
    """So that scrapers without end do not hold up the streams."""
    busy, registry = Busy(seconds), CollectorRegistry()
    registry.register(busy)
    busy.times = 0
    app = web.Application()
    app.router.add_get("/", scraper(registry))

    async def ask() -> None:
        async with opened(app, connections=10) as port, ClientSession() as session:
            for _ in range(8):
                async with session.get(f"http://127.0.0.1:{port.port}/") as response:
                    assert f"times {busy.times}.0" in await response.text()

    asyncio.run(ask())
    assert busy.times == times
