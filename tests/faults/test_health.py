"""Health of a server that answers on its port, but whose requests stand still."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lorarep_server.demo.voices import BASE, MODELS
from lorarep_server.requests.stall_watch import StallWatch
from lorarep_server.requests.workers import ADMISSION_THREADS

from tests.support.callers import NOT_SERVING, SERVING, health, request
from tests.support.failpoints import Failpoints
from tests.support.servers import SECONDS, Server, serving, wait_for

WANTED = request("x", new_tokens=3)
SERVICES = {
    "lorarep.v1.GenerationService",
    "lorarep.v1.AdapterService",
    "lorarep.v1.ModelService",
    "fmaas.GenerationService",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
    return Failpoints(tmp_path_factory.mktemp("health") / "failpoints")


@pytest.fixture(scope="module")
def server(own: Failpoints) -> Iterator[Server]:
    """A server that a standstill of a moment makes unready, and one of four seconds dead."""
    with serving([f"--base={MODELS / BASE}", "--kv-bytes=16MiB", "--stall-seconds=0.2"], own.env) as server:
        yield server.wait_ready()


def wait_health(server: Server, service: str, status: int) -> None:
    wait_for(lambda: health(server, service) == status, f"another status of {service}", 60)


def test_a_step_that_hangs_ends_readiness_and_in_time_liveness(server: Server, own: Failpoints) -> None:
    own.set("step", "hold")
    call = server.generation.Generate.future(WANTED, timeout=SECONDS)
    try:
        for service in ("readiness", *SERVICES):
            wait_health(server, service, NOT_SERVING)
        assert health(server, "liveness") == SERVING
        wait_health(server, "liveness", NOT_SERVING)
    finally:
        own.clear()
    assert len(call.result().token_ids) == 3
    for service in ("readiness", "liveness", *SERVICES):
        wait_health(server, service, SERVING)


def test_threads_of_admission_that_hang_end_readiness(server: Server, own: Failpoints) -> None:
    wait_health(server, "readiness", SERVING)
    own.set("admission", "hold")
    calls = [server.generation.Generate.future(WANTED, timeout=SECONDS) for _ in range(ADMISSION_THREADS)]
    try:
        wait_health(server, "readiness", NOT_SERVING)
    finally:
        own.clear()
    assert [len(call.result().token_ids) for call in calls] == [3] * ADMISSION_THREADS
    wait_health(server, "readiness", SERVING)


def test_health_lists_the_services_by_their_names(server: Server) -> None:
    wait_health(server, "readiness", SERVING)
    listed = health_pb2_grpc.HealthStub(server.channel).List(health_pb2.HealthListRequest(), timeout=SECONDS)
    assert listed.statuses.keys() == {"", "liveness", "readiness", *SERVICES}
    assert {answer.status for answer in listed.statuses.values()} == {SERVING}
    assert not any("Traceback" in line for line in server.log)


def test_work_that_takes_long_and_no_work_are_no_standstill() -> None:
    stats = SimpleNamespace(running=0, waiting=0)
    engine = SimpleNamespace(turns=0, admitted=0, stats=lambda: stats)
    admitted = asyncio.Event()

    async def admit() -> None:
        await admitted.wait()

    async def look() -> None:
        admitted.set()
        watch = StallWatch(engine, admit, lambda: engine.admitted, 0.001)

        async def looks(turns: int = 0, admitted: int = 0) -> float:
            for _ in range(10):
                engine.turns += turns
                engine.admitted += admitted
                seconds = await watch.wait_and_look()
            return seconds

        assert await looks() == 0
        stats.running = 1
        assert await looks(turns=1) == 0
        assert await looks() == pytest.approx(0.01)
        assert await looks(turns=1) == 0
        stats.running, stats.waiting = 0, 1
        assert await looks() > 0
        stats.waiting = 0
        assert await looks() == 0
        admitted.clear()
        assert await looks() >= 0.008
        assert await looks(admitted=1) == 0  # others pass: it waits behind them
        assert await looks() >= 0.008
        admitted.set()
        assert await looks() == 0
        watch.close()

    asyncio.run(look())
