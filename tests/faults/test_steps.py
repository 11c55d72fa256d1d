"""Faults of engine steps, and of the callers that wait for their tokens."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from lorarep_runtime.engine.step_loop import MAX_FAILURES
from tests.faults.conftest import assert_nothing_left_at_the_end
from tests.support.callers import NOT_SERVING, Bystander, health, refused, request, stream
from tests.support.failpoints import Failpoints
from tests.support.servers import LORAREP, SECONDS, Server, serving, wait_for
from tests.support.world import World

LONG = request("x", "lora", new_tokens=500)


def test_a_killed_client_process_frees_its_pages(server: Server, bystander: Bystander, failpoints: Failpoints) -> None:
    failpoints.set("step", "sleep 0.2")  # the stream must not end before it is seen
    command = [*LORAREP, "generate", "x", f"--server={server.address}", "--adapter=lora", "--max-new-tokens=500"]
    with subprocess.Popen([*command, "--ignore-eos"], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.read(1)
        wait_for(lambda: "lora" in running(server), "the stream to run")
        client.send_signal(signal.SIGKILL)
        wait_for(lambda: "lora" not in running(server), "the stream to end", 90)


def running(server: Server) -> str:
    """The adapters of running requests, joined by commas."""
    sample = next(name for name in server.metrics() if name.startswith("lorarep_lora_requests_info"))
    return sample.partition("running_lora_adapters=")[2].partition("}")[0]


def test_a_deadline_in_a_slow_step_ends_running_and_queued(
    server: Server, bystander: Bystander, failpoints: Failpoints
) -> None:
    failpoints.set("step", "sleep 0.3")
    calls = [stream(server, LONG, timeout=0.8) for _ in range(12)]  # more than can run concurrently
    for call in calls:
        refused(lambda call=call: list(call), "DEADLINE_EXCEEDED")
    wait_for(lambda: "lora" not in running(server), "the streams to end")


def test_an_error_in_a_forward_pass_ends_its_streams_and_the_engine_recovers(
    server: Server, bystander: Bystander, failpoints: Failpoints
) -> None:
    bystander.may_end = True
    failpoints.set("step", "sleep 0.05")  # no stream must end before the error
    calls = [stream(server, LONG) for _ in range(3)]
    for call in calls:
        for _ in range(2):  # the first token may come from a prefill pass, concurrent with the others' step
            next(message for message in call if message.chunk.token_ids)
    failpoints.set("forward", "once error")
    for call in calls:
        error = refused(lambda call=call: list(call), "INTERNAL", "forward pass failed")
        assert "failpoint" not in error.details()  # details are in the log alone
    failpoints.wait_reached("forward")
    failpoints.clear()
    bystander.recover()
    assert len(server.generation.Generate(request("x", "lora")).token_ids) == 12
    assert server.process.poll() is None


def test_an_engine_that_cannot_go_on_ends_the_process(world: World, server: Server, failpoints: Failpoints) -> None:
    alone = server.generation.Generate(LONG).token_ids
    own = Failpoints(world.cache.parent / "own-failpoints")
    with serving([*world.flags(), "--adapter=lora=org/lora"], {**world.env, **own.env}) as failing:
        failing.wait_ready()
        own.set("step", "sleep 0.05")  # the stream must not end before the error
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
        assert len(failing.generation.Generate(request("x")).token_ids) == 12  # resets the count of failures
        fail(failing, own, MAX_FAILURES)
        assert failing.process.wait(30) == 1
        assert seen[-1] == NOT_SERVING
        assert_nothing_left_at_the_end(failing)


def fail(server: Server, failpoints: Failpoints, times: int) -> None:
    """Makes so many forward passes fail."""
    failpoints.set("forward", "error")
    for _ in range(times):
        refused(lambda: server.generation.Generate(request("x")), "INTERNAL", "forward pass failed")


def watch(server: Server) -> list[int]:
    """The list of a server's liveness states, which gRPC's own thread extends until the server ends."""
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
        own.set("step", "sleep 0.05")  # the stream must not end before the step hangs
        call = stream(hanging, request("x", new_tokens=500))
        next(message for message in call if message.chunk.token_ids)
        own.set("step", "hold")
        own.wait_reached("step")
        hanging.process.send_signal(signal.SIGTERM)
        wait_for(lambda: health(hanging, "readiness") == NOT_SERVING, "readiness to go")
        refused(lambda: list(call), "UNAVAILABLE")
        assert hanging.process.wait(SECONDS) == 0
