"""Servers that are told to end or are killed at the worst moment, and the restart after it."""

from __future__ import annotations

import fcntl
import signal
import threading
from collections import Counter
from pathlib import Path

import grpc
import pytest
from lorarep.v1 import generation_pb2_grpc

from tests.faults.conftest import assert_nothing_left_at_the_end
from tests.support.callers import NOT_SERVING, SERVING, adapters, health, loading, refused, request, stream
from tests.support.failpoints import Failpoints
from tests.support.models import save_adapter
from tests.support.servers import SECONDS, Server, serving, wait_for
from tests.support.world import ADAPTERS, World

WEIGHTS = "adapter_model.safetensors"
WANTED = request("x", "dora", new_tokens=40)


@pytest.fixture
def own(tmp_path: Path) -> Failpoints:
    return Failpoints(tmp_path / "failpoints")


@pytest.mark.parametrize(
    ("held", "flag"),
    [
        ("base", "--adapter=dora=org/dora"),
        ("adapter", "--adapter=dora=org/dora"),
        ("adapter", "--adapters-file={file}"),
    ],
)
def test_sigterm_during_a_start_ends_with_status_0(
    world: World, own: Failpoints, tmp_path: Path, held: str, flag: str
) -> None:
    own.set(held, "hold")
    file = tmp_path / "adapters.yaml"
    file.write_text("dora: {repository: org/dora}")
    with serving([*world.flags(), flag.format(file=file)], {**world.env, **own.env}) as server:
        own.wait_reached(held)
        assert (health(server, "liveness"), health(server, "readiness")) == (SERVING, NOT_SERVING)
        if flag.startswith("--adapter="):  # adapters of the file do not delay the base
            refused(lambda: server.generation.Generate(WANTED), "UNAVAILABLE")
        assert server.stop() == 0


def test_callers_that_never_stop_are_refused_until_nobody_listens(world: World) -> None:
    """Calls that arrive on an open connection while it closes are UNAVAILABLE too."""
    codes: Counter[str] = Counter()
    with serving(world.flags(), world.env) as server:
        server.wait_ready()

        def call_on() -> None:
            with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                while server.process.poll() is None:
                    try:
                        stub.Generate(request("x", new_tokens=1))
                        codes["OK"] += 1
                    except grpc.RpcError as error:
                        codes[error.code().name] += 1

        callers = [threading.Thread(target=call_on) for _ in range(8)]
        for caller in callers:
            caller.start()
        wait_for(lambda: codes["OK"] > 20, "answers")
        assert server.stop() == 0
        for caller in callers:
            caller.join()
    assert codes.keys() == {"OK", "UNAVAILABLE"}


def test_sigterm_during_a_load_lets_streams_finish(world: World, own: Failpoints) -> None:
    flags = [*world.flags(), "--adapter=dora=org/dora", "--allow-repository=org/*", "--grace-seconds=15"]
    with serving(flags, {**world.env, **own.env}) as server:
        server.wait_ready()
        alone = server.generation.Generate(WANTED).token_ids
        own.set("adapter", "hold")
        late = loading(server, "late", "org/lora")
        own.wait_reached("adapter")
        own.set("step", "hold")  # the stream must not end before the checks
        call = stream(server, WANTED)
        next(call)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: health(server, "readiness") == NOT_SERVING, "readiness to go")
        refused(lambda: server.generation.Generate(WANTED), "UNAVAILABLE")
        own.unset("step")
        assert [token for message in call for token in message.chunk.token_ids] == alone
        refused(lambda: list(late), "UNAVAILABLE")
        assert server.process.wait(SECONDS) == 0
        assert_nothing_left_at_the_end(server)


@pytest.mark.parametrize("moment", ["download", "load"])
def test_killed_in_a_download_or_a_load_a_restart_is_ready_and_downloads_nothing_twice(
    world: World, own: Failpoints, server: Server, tmp_path: Path, moment: str
) -> None:
    repository = f"org/killed-in-a-{moment}"
    world.hub.publish(repository, save_adapter(world.base, tmp_path / "new", seed=6, **ADAPTERS["lora"]))
    cache = tmp_path / "cache"
    flags = ["--base=org/base", "--dtype=float32", "--kv-bytes=2MiB", f"--cache-dir={cache}"]
    flags += ["--adapter=dora=org/dora", "--allow-repository=org/*"]
    alone = server.generation.Generate(WANTED).token_ids
    whole = cache / f"models--{repository.replace('/', '--')}" / "snapshots"
    with serving(flags, {**world.env, **own.env}) as killed:
        killed.wait_ready()
        own.set("step", "hold")  # the stream must not end before the kill
        call = stream(killed, WANTED)
        next(call)
        if moment == "download":
            world.hub.hanging.clear()
            world.hub.hangs[WEIGHTS] = 100
        else:
            own.set("adapter", "hold")
        new = loading(killed, "new", repository)
        if moment == "download":
            assert world.hub.hanging.wait(SECONDS)
        else:
            own.wait_reached("adapter")
        assert killed.stop(signal.SIGKILL) == -signal.SIGKILL
        for ended in (call, new):
            refused(lambda ended=ended: list(ended), "UNAVAILABLE")
        world.hub.hangs.clear()
        own.clear()
    kept = {path.name for path in whole.glob("*/*")}
    assert (WEIGHTS in kept) == (moment == "load")
    world.hub.asked.clear()
    with serving([*flags, f"--adapter=new={repository}"], world.env) as restarted:
        restarted.wait_ready()
        assert restarted.generation.Generate(WANTED).token_ids == alone
        assert len(restarted.generation.Generate(request("x", "new")).token_ids) == 12
        assert set(adapters(restarted)) == {"dora", "new"}
    downloaded = Counter(world.hub.downloads())
    assert set(downloaded) <= {WEIGHTS, "adapter_config.json"} - kept
    assert set(downloaded.values()) <= {1}


def test_clients_of_a_killed_server_are_told(world: World, own: Failpoints) -> None:
    with serving(world.flags(), {**world.env, **own.env}) as server:
        server.wait_ready()
        own.set("step", "sleep 0.05")
        call = stream(server, request("x", new_tokens=400))
        next(call)
        server.process.send_signal(signal.SIGKILL)
        refused(lambda: list(call), "UNAVAILABLE")


def test_a_log_that_nobody_reads_holds_nobody_up(world: World) -> None:
    with serving([*world.flags(), "--log-level=debug"], world.env) as server:
        server.wait_ready()
        assert server.process.stderr is not None
        fcntl.fcntl(server.process.stderr, fcntl.F_SETPIPE_SZ, 1 << 12)
        server.reads.clear()
        for _ in range(300):
            refused(lambda: server.generation.Generate(request("x", "absent"), timeout=SECONDS), "NOT_FOUND")
        assert len(server.generation.Generate(request("x"), timeout=SECONDS).token_ids) == 12
        assert server.stop() == 0
