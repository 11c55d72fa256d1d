"""Faults of a step, and of those who wait for its tokens."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from lorarep_runtime.engine.engine import MAX_FAILURES
from tests.faults.conftest import Failpoints, Innocent, assert_nothing_left_at_the_end, refused
from tests.server.conftest import World
from tests.server.test_life import NOT_SERVING, health
from tests.support.servers import LORAREP, SECONDS, Server, request, serving, stream, wait_for

LONG = request("x", "lora", new_tokens=500)


def test_a_killed_client_process_frees_its_pages(server: Server, innocent: Innocent, failpoints: Failpoints) -> None:
    failpoints.set("step", "sleep 0.2")  # so that the stream is under way for as long as the client takes to be seen
    command = [*LORAREP, "generate", "x", f"--server={server.address}", "--adapter=lora", "--max-new-tokens=500"]
    with subprocess.Popen([*command, "--ignore-eos"], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.read(1)
        wait_for(lambda: "lora" in running(server), "the stream to run")
        client.send_signal(signal.SIGKILL)
        wait_for(lambda: "lora" not in running(server), "the stream to end", 90)


def running(server: Server) -> str:
    """Adapters of running requests, comma-joined."""
    sample = next(name for name in server.metrics() if name.startswith("lorarep_lora_requests_info"))
    return sample.partition("running_lora_adapters=")[2].partition("}")[0]


def test_a_deadline_in_a_slow_step_ends_running_and_queued(
    server: Server, innocent: Innocent, failpoints: Failpoints
) -> None:
    failpoints.set("step", "sleep 0.3")
    calls = [stream(server, LONG, timeout=0.8) for _ in range(12)]  # more than run at a time
    for call in calls:
        refused(lambda call=call: list(call), "DEADLINE_EXCEEDED")
    wait_for(lambda: "lora" not in running(server), "the streams to end")


def test_an_error_in_a_forward_pass_ends_its_streams_and_the_engine_recovers(
    server: Server, innocent: Innocent, failpoints: Failpoints
) -> None:
    innocent.may_end = True
    failpoints.set("step", "sleep 0.05")  # so that none ends before the error
    calls = [stream(server, LONG) for _ in range(3)]
    for call in calls:
        for _ in range(2):  # the first may be of a pass over its prompt, beside the others' step
            next(message for message in call if message.chunk.token_ids)
    failpoints.set("forward", "once error")
    for call in calls:
        error = refused(lambda call=call: list(call), "INTERNAL", "forward pass failed")
        assert "failpoint" not in error.details()  # what went wrong is in the log alone
    failpoints.wait_reached("forward")
    failpoints.clear()
    innocent.recover()
    assert len(server.generation.Generate(request("x", "lora")).token_ids) == 12
    assert server.process.poll() is None


def test_an_engine_that_cannot_go_on_ends_the_process(world: World, server: Server, failpoints: Failpoints) -> None:
    alone = server.generation.Generate(LONG).token_ids
    own = Failpoints(world.cache.parent / "own-failpoints")
    with serving([*world.flags(), "--adapter=lora=org/lora"], {**world.env, **own.env}) as failing:
        failing.wait_ready()
        own.set("step", "sleep 0.05")  # so that it does not end before the error
        call = stream(failing, LONG)
        tokens = [*next(message for message in call if message.chunk.token_ids).chunk.token_ids]
        seen = watch(failing)
        own.set("step", "error")

        def rest() -> None:
            for message in call:
                tokens.extend(message.chunk.token_ids)

        refused(rest, "INTERNAL", "engine has failed")
        assert tokens == alone[: len(tokens)]
        assert failing.process.wait(SECONDS) == 1
        wait_for(lambda: seen[-1] == NOT_SERVING, "the end of liveness")
        failing.wait_logged(lambda line: "failpoint step" in line, "the cause")
        assert_nothing_left_at_the_end(failing)


def test_an_engine_whose_every_forward_pass_fails_ends_the_process(world: World, tmp_path: Path) -> None:
    own = Failpoints(tmp_path / "failpoints")
    with serving(world.flags(), {**world.env, **own.env}) as failing:
        failing.wait_ready()
        seen = watch(failing)
        fail(failing, own, MAX_FAILURES - 1)
        own.clear()
        assert len(failing.generation.Generate(request("x")).token_ids) == 12  # one that works counts for all before
        fail(failing, own, MAX_FAILURES)
        assert failing.process.wait(30) == 1
        assert seen[-1] == NOT_SERVING
        assert_nothing_left_at_the_end(failing)


def fail(server: Server, failpoints: Failpoints, times: int) -> None:
    failpoints.set("forward", "error")
    for _ in range(times):
        refused(lambda: server.generation.Generate(request("x")), "INTERNAL", "forward pass failed")


def watch(server: Server) -> list[int]:
    """What the liveness of a server has been, until it ends; filled by gRPC's own thread."""
    seen: list[int] = []
    watching = server.channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )(health_pb2.HealthCheckRequest(service="liveness"))
    seen.append(next(watching).status)

    def follow() -> None:
        with suppress(grpc.RpcError):
            seen.extend(message.status for message in watching)

    threading.Thread(target=follow, daemon=True).start()
    return seen


def test_sigterm_ends_a_server_whose_step_hangs(world: World, server: Server, failpoints: Failpoints) -> None:
    own = Failpoints(world.cache.parent / "hanging-failpoints")
    flags = [*world.flags(), "--grace-seconds=0.5"]
    with serving(flags, {**world.env, **own.env}) as hanging:
        hanging.wait_ready()
        own.set("step", "sleep 0.05")  # so that it has not ended before it hangs
        call = stream(hanging, request("x", new_tokens=500))
        next(message for message in call if message.chunk.token_ids)
        own.set("step", "hold")
        own.wait_reached("step")
        hanging.process.send_signal(signal.SIGTERM)
        wait_for(lambda: health(hanging, "readiness") == NOT_SERVING, "readiness to go")
        refused(lambda: list(call), "UNAVAILABLE")
        assert hanging.process.wait(SECONDS) == 0
