"""The life of a server: its configuration, its start, and its end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
import yaml
from lorarep.v1 import model_pb2
from lorarep_server.addresses import parse_address

from tests.support.callers import NOT_SERVING, SERVING, health, request, stream
from tests.support.failpoints import Failpoints
from tests.support.servers import SECONDS, Server, lorarep, serving, wait_for
from tests.support.world import World


def test_sigterm_lets_streams_finish_and_takes_no_more(world: World, tmp_path: Path) -> None:
    """The server is configured by file, environment and flag: the flag wins, then the environment."""
    file = world.cache.parent / "server.yaml"
    settings = {
        "base": "org/base",
        "dtype": "float32",
        "kv-bytes": "1MiB",
        "grace-seconds": SECONDS,
        "cache_dir": str(world.cache),
        "stack": {"deep": [[0, 4], [2, 6]]},
        "adapter": ["lora=org/lora"],
        "max-rank": 7,
        "max-queued": 5,
    }
    file.write_text(yaml.safe_dump(settings))
    env = {**world.env, "LORAREP_SERVE_MAX_RANK": "8", "LORAREP_SERVE_MAX_QUEUED": "6"}
    failpoints = Failpoints(tmp_path / "failpoints")
    env["LORAREP_FAILPOINTS"] = str(failpoints.folder)
    with serving([f"--config={file}", "--max-queued=9"], env) as server:
        server.wait_ready()
        limits = server.model.GetModel(model_pb2.GetModelRequest()).limits
        assert (limits.max_rank, limits.max_queued) == (8, 9)
        assert [s.name for s in server.model.ListStacks(model_pb2.ListStacksRequest()).stacks] == ["base", "deep"]
        wanted = request("abc", "lora", new_tokens=400)
        failpoints.set("step", "hold")  # the stream must not end before readiness is checked
        call = stream(server, wanted)
        next(call)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: health(server, "readiness") == NOT_SERVING, "readiness to go")
        assert health(server, "liveness") == SERVING
        with pytest.raises(grpc.RpcError) as error:
            server.generation.Generate(request("abc"))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.metrics()["lorarep_requests_finished_total{reason=unavailable}"] == 1
        failpoints.unset("step")
        assert sum(len(message.chunk.token_ids) for message in call) == 400
        assert server.process.wait(SECONDS) == 0


@pytest.mark.usefixtures("slow_steps")
def test_the_grace_time_ends_streams(world: World) -> None:
    with serving([*world.flags(), "--grace-seconds=0.2"], world.env) as server:
        server.wait_ready()
        call = stream(server, request("abc", new_tokens=500))
        next(call)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.process.wait(SECONDS) == 0


def test_sigterm_during_a_stalled_start(world: World) -> None:
    with serving([*world.flags(), "--adapter=late=org/late"], world.env) as server:
        world.hub.stalled, world.hub.faulty = True, "org/late"
        try:
            # The port is open before the base is loaded.
            assert (health(server, "liveness"), health(server, "readiness")) == (SERVING, NOT_SERVING)
            asked = lorarep("health", f"--server={server.address}")
            assert (asked.returncode, asked.stdout) == (1, "NOT_SERVING\n")
            with pytest.raises(grpc.RpcError) as error:
                server.generation.Generate(request("abc"))
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert server.metrics()["lorarep_requests_finished_total{reason=unavailable}"] == 1
            assert server.stop() == 0
        finally:
            world.hub.stalled, world.hub.faulty = False, ""


def test_a_cached_start_needs_no_hub(world: World, server: Server) -> None:
    world.hub.status = 500
    try:
        with serving([*world.flags(), "--adapter=lora=org/lora"], world.env) as other:
            other.wait_ready()
            wanted = request("abc", "lora")
            assert other.generation.Generate(wanted).token_ids == server.generation.Generate(wanted).token_ids
    finally:
        world.hub.status = None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--base=org/absent"], "org/absent"),
        (["--base=org/base", "--max-sequence-tokens=100000"], "max_sequence_tokens"),
        (["--base=org/base", "--stack=deep=0-99"], "stack 'deep'"),
        (["--base=org/base", "--adapter=x=org/absent"], "org/absent"),
        (["--base=org/base", "--kv-bytes=1KiB"], "kv_bytes"),
    ],
    ids=str,
)
def test_a_start_that_fails_says_why_in_one_line(world: World, arguments: list[str], named: str) -> None:
    ports = ["--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", f"--cache-dir={world.cache}"]
    ended = lorarep("serve", *ports, *arguments, "--log-level=error", env=world.env)
    assert ended.returncode == 1
    assert named in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("flags", "content", "named"),
    [
        ([], {"base": "org/base", "bases": 1}, "bases"),
        ([], {"base": "org/base", "max-rank": "many"}, "max-rank"),
        ([], {"base": ["org/base"]}, "base"),
        ([], {"base": "org/base", "stack": {"deep": "zero"}}, "deep"),
        ([], ["base"], "not a mapping"),
        (["--quantization=int3"], {"base": "org/base"}, "int3"),
        (["--max-rank=0"], {"base": "org/base"}, "max-rank"),
        (["--adapter=lora"], {"base": "org/base"}, "adapter"),
        (["--adapter=a=x/y", "--adapter=a=x/z"], {"base": "org/base"}, "'a' is named twice"),
        ([], {}, "--base"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(tmp_path: Path, flags: list[str], content: object, named: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(yaml.safe_dump(content))
    ended = lorarep("serve", f"--config={file}", *flags)
    assert ended.returncode == 2
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_said(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        free = "--listen=127.0.0.1:0"
        for flags in (
            [f"--listen={address}"],
            [free, f"--metrics-listen={address}"],
            [free, f"--health-listen={address}"],
        ):
            ended = lorarep("serve", *world.flags(), *flags, "--log-level=error")
            assert ended.returncode == 1
            assert address in ended.stderr.splitlines()[-1]


def test_random_bytes_on_the_port_harm_nobody(server: Server) -> None:
    address = parse_address(server.address)
    threads = []
    for i in range(20):

        def spoil(i: int = i) -> None:
            with socket.create_connection(address) as connection:
                connection.sendall(bytes((7 * i + 13 * j * j) % 256 for j in range(4096)))

        threads.append(threading.Thread(target=spoil))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(server.generation.Generate(request("abc")).token_ids) == 12


def test_a_server_listens_before_it_has_torch() -> None:
    """Importing torch takes seconds. Health and errors of flags do not wait for it."""
    seen = "import sys, lorarep_server.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", seen]).returncode == 0
