"""Faults while an adapter is loaded: the Hub, the disk, device memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lorarep.v1 import adapters_pb2

from tests.faults.conftest import nothing_left
from tests.support.callers import Bystander, adapters, load, loading, refused, request, stream, unload
from tests.support.failpoints import HUB_SECONDS, Failpoints
from tests.support.hub_faults import FaultyHub
from tests.support.models import save_adapter
from tests.support.servers import Server, serving
from tests.support.world import ADAPTERS, World

WEIGHTS = "adapter_model.safetensors"
ON_DEVICE = adapters_pb2.ADAPTER_TIER_DEVICE


@pytest.fixture
def hub(world: World) -> Iterator[FaultyHub]:
    """The server's Hub. Its faults are cleared after each test."""
    hub = world.hub
    yield hub
    hub.stalled, hub.status, hub.faulty, hub.garbage = False, None, "", None
    for faults in (hub.cuts, hub.hangs, hub.claims):
        faults.clear()


@pytest.fixture
def new(world: World, tmp_path: Path) -> str:
    """A new repository, which is in no cache."""
    name = f"org/{tmp_path.name[:60]}"
    world.hub.publish(name, save_adapter(world.base, tmp_path / "new", seed=5, **ADAPTERS["plain"]))
    return name


@pytest.mark.parametrize(
    "fault", ["stalls", "hangs in a body", "cuts", "limits the rate", "is broken", "talks garbage"]
)
def test_a_hub_that_fails_is_unavailable_in_time_and_others_load_on(
    server: Server, bystander: Bystander, hub: FaultyHub, new: str, fault: str
) -> None:
    match fault:
        case "stalls":
            hub.faulty, hub.stalled = new, True
        case "hangs in a body":
            hub.hangs[WEIGHTS] = 100
        case "cuts":
            hub.cuts[WEIGHTS] = [100] * 20
        case "limits the rate":
            hub.faulty, hub.status = new, 429
        case "is broken":
            hub.faulty, hub.status = new, 503
        case "talks garbage":
            hub.garbage = b"<html>down for maintenance</html>"
    began = time.monotonic()
    refused(lambda: load(server, "new", new), "UNAVAILABLE", new if fault != "limits the rate" else "rate")
    assert time.monotonic() - began < 30 * HUB_SECONDS
    assert load(server, "beside", "org/lora").tier == ON_DEVICE  # loaded from the cache
    unload(server, "beside")
    hub.garbage, hub.stalled, hub.status = None, False, None
    hub.cuts.clear()
    hub.hangs.clear()
    assert load(server, "new", new).tier == ON_DEVICE
    unload(server, "new")


@pytest.mark.parametrize(
    ("file", "claim", "code"),
    [(WEIGHTS, 1 << 40, "FAILED_PRECONDITION"), (WEIGHTS, 1000, "DATA_LOSS"), ("adapter_config.json", 50, "DATA_LOSS")],
)
def test_a_hub_that_lies_about_a_size_poisons_no_cache(
    server: Server, bystander: Bystander, hub: FaultyHub, world: World, new: str, file: str, claim: int, code: str
) -> None:
    hub.claims[file] = claim
    refused(lambda: load(server, "new", new), code, file)
    assert "new" not in adapters(server)
    assert not list(world.cache.glob(f"models--{new.replace('/', '--')}/snapshots/*/{file}"))
    hub.claims.clear()
    assert load(server, "new", new).tier == ON_DEVICE
    unload(server, "new")


def test_device_memory_that_is_short_while_loading_leaves_what_is_loaded(
    server: Server, bystander: Bystander, failpoints: Failpoints
) -> None:
    alone = server.generation.Generate(request("x", "lora")).token_ids
    failpoints.set("step", "hold")
    failpoints.wait_reached("step")  # dora is in use from now on; between two streams it could be evicted
    failpoints.set("adapter", "out-of-memory")
    error = refused(lambda: load(server, "plain", "org/plain"), "RESOURCE_EXHAUSTED", "device memory")
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    here = adapters(server)
    assert here["lora"].tier != ON_DEVICE  # it was idle, and was evicted for the new one
    assert here["dora"].tier == ON_DEVICE
    assert "plain" not in here
    failpoints.clear()
    assert server.generation.Generate(request("x", "lora")).token_ids == alone  # the request loads it again
    failpoints.set("adapter", "once out-of-memory")
    assert load(server, "plain", "org/plain").tier == ON_DEVICE
    unload(server, "plain")


def test_a_panic_while_loading_ends_that_load_alone(
    server: Server, bystander: Bystander, failpoints: Failpoints
) -> None:
    """A library in Rust panics with what is no Exception."""
    for stage in ("adapter", "load-compile"):
        failpoints.set(stage, "once panic")
        refused(lambda: load(server, "plain", "org/plain"), "INTERNAL", "the server's log")
    failed = "lorarep_adapter_load_seconds_count{outcome=internal}{source=hub}"
    assert server.metrics()[failed] == 2
    assert load(server, "plain", "org/plain").tier == ON_DEVICE
    unload(server, "plain")


def test_the_bases_file_may_be_written_to_once_the_server_is_ready(
    server: Server, bystander: Bystander, world: World
) -> None:
    (link,) = world.cache.glob("models--org--base/snapshots/*/model.safetensors")
    content = link.read_bytes()
    try:
        os.truncate(link, 0)
        bystander.recover()
    finally:
        link.resolve().write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "overwritten"])
def test_weights_that_are_written_to_while_they_are_loaded_end_that_load_alone(
    server: Server, bystander: Bystander, failpoints: Failpoints, world: World, tmp_path: Path, how: str
) -> None:
    """As `cp` over a served folder does; a mapped file that is cut ends the process."""
    repository = f"org/{tmp_path.name[:60]}"
    asked = dict(r=64, target_modules=["q_proj", "up_proj", "down_proj"])
    world.hub.publish(repository, save_adapter(world.base, tmp_path / "new", seed=5, **asked))
    load(server, "before", repository)
    alone = server.generation.Generate(request("x", "before")).token_ids
    (link,) = world.cache.glob(f"models--{repository.replace('/', '--')}/snapshots/*/{WEIGHTS}")
    file, content = link.resolve(), link.read_bytes()
    failpoints.set("load-compile", "hold")
    call = loading(server, "new", repository)
    failpoints.wait_reached("load-compile")
    if how == "cut":
        os.truncate(file, 0)
    else:
        with file.open("r+b") as opened:
            opened.write(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    failpoints.unset("load-compile")
    refused(lambda: list(call), "DATA_LOSS", WEIGHTS)
    assert "new" not in adapters(server)
    assert server.generation.Generate(request("x", "before")).token_ids == alone
    file.write_bytes(content)
    assert load(server, "new", repository).tier == ON_DEVICE
    assert server.generation.Generate(request("x", "new")).token_ids == alone
    for name in ("before", "new"):
        unload(server, name)


def test_an_adapter_in_use_finishes_when_it_is_unloaded_and_evicted(
    server: Server, bystander: Bystander, failpoints: Failpoints
) -> None:
    for name in ("going", "idle"):
        load(server, name, "org/lora")
    wanted = request("x", "going", new_tokens=200)
    alone = server.generation.Generate(wanted).token_ids
    failpoints.set("step", "sleep 0.05")  # the adapter must stay in use for the rest of the test
    call = stream(server, wanted)
    tokens = [*next(message for message in call if message.chunk.token_ids).chunk.token_ids]
    unload(server, "going")
    failpoints.set("adapter", "once out-of-memory")
    load(server, "going", "org/plain")  # another adapter takes the name while memory is short
    failpoints.unset("step")
    tokens += [token for message in call for token in message.chunk.token_ids]
    assert tokens == alone
    for name in ("going", "idle"):
        unload(server, name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if mounted.returncode:
        pytest.skip(f"a small filesystem can be mounted by root alone: {mounted.stdout}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_exhausted_with_nothing_partial_until_there_is_room(
    world: World, failpoints: Failpoints, small_disk: Path, tmp_path: Path
) -> None:
    large = save_adapter(world.base, tmp_path / "large", r=64, target_modules=["up_proj", "down_proj"])
    world.hub.publish("org/large", large)
    cache = small_disk / "cache"
    flags = ["--base=org/base", "--dtype=float32", "--kv-bytes=2MiB", f"--cache-dir={cache}"]
    loaded = ["--allow-repository=org/*", "--adapter=dora=org/dora"]
    with serving([*flags, *loaded], {**world.env, **failpoints.env}) as server:
        server.wait_ready()
        free = os.statvfs(small_disk)
        with (small_disk / "ballast").open("wb") as ballast:
            ballast.write(bytes(free.f_bavail * free.f_frsize - (200 << 10)))
        with nothing_left(server, failpoints):
            refused(lambda: load(server, "large", "org/large"), "RESOURCE_EXHAUSTED", "disk")
            assert "large" not in adapters(server)
            assert not list(cache.glob(f"models--org--large/snapshots/*/{WEIGHTS}"))
            load(server, "beside", "org/dora")  # it is cached, and needs no disk space
            unload(server, "beside")
            (small_disk / "ballast").unlink()
            assert load(server, "large", "org/large").tier == ON_DEVICE
            unload(server, "large")
