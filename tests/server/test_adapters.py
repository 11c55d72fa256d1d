"""Adapters that are loaded and unloaded while other requests stream."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from lorarep.v1 import adapters_pb2 as pb

from tests.support.callers import adapters, load, loading, request, stream, unload
from tests.support.models import save_adapter
from tests.support.servers import SECONDS, Server, wait_for
from tests.support.world import ADAPTERS, World

LORA = ADAPTERS["lora"]


def refused(call: Callable[[], object], code: str, named: str) -> None:
    with pytest.raises(grpc.RpcError) as error:
        call()
    assert error.value.code().name == code
    assert named in error.value.details()


def test_an_adapter_from_load_to_unload(server: Server, world: World) -> None:
    commit = world.hub.repositories["org/plain"].refs["main"]
    loaded = load(server, "mine", "org/plain")
    assert (loaded.name, loaded.repository, loaded.commit) == ("mine", "org/plain", commit)
    assert loaded.tier == pb.ADAPTER_TIER_DEVICE
    assert (loaded.kind, loaded.rank, list(loaded.layers)) == (pb.ADAPTER_KIND_LORA, 2, list(range(6)))
    assert loaded.parameters == 6 * 2 * (64 + 128)
    assert load(server, "mine", "org/plain") == loaded  # the same load again changes nothing
    refused(lambda: load(server, "mine", "org/lora"), "ALREADY_EXISTS", "mine")
    assert server.adapters.GetAdapter(pb.GetAdapterRequest(name="mine")).adapter == loaded
    names = [a.name for a in server.adapters.ListAdapters(pb.ListAdaptersRequest()).adapters]
    assert {"lora", "dora", "mine"} <= set(names)
    assert names == sorted(names)
    unload(server, "mine")
    refused(lambda: server.adapters.GetAdapter(pb.GetAdapterRequest(name="mine")), "NOT_FOUND", "mine")
    refused(lambda: unload(server, "mine"), "NOT_FOUND", "mine")


def test_folders_of_a_repository_are_adapters_by_load_and_by_request(
    server: Server, world: World, tmp_path: Path
) -> None:
    for name, folder in (("checkpoint-430", "lora"), ("run/adapter", "plain")):
        shutil.copytree(world.adapters[folder], tmp_path / "both" / name)
    commit = world.hub.publish("org/both", tmp_path / "both")
    loaded = load(server, "checkpoint", "org/both/checkpoint-430")
    assert (loaded.repository, loaded.commit) == ("org/both/checkpoint-430", commit)
    for source, same in ((f"org/both/run/adapter@{commit}", "org/plain"), ("checkpoint", "org/lora")):
        answers = [server.generation.Generate(request("abc", name)) for name in (source, same)]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].adapters[0].commit == commit
    refused(lambda: server.generation.Generate(request("abc", "org/both")), "NOT_FOUND", "org/both/run/adapter")
    refused(lambda: server.generation.Generate(request("abc", "org/both/../plain")), "INVALID_ARGUMENT", "repository")
    refused(lambda: server.generation.Generate(request("abc", "other/both/org")), "PERMISSION_DENIED", "allow-list")


def test_a_stream_goes_on_while_an_adapter_is_downloaded_and_one_is_unloaded(
    server: Server, world: World, tmp_path: Path
) -> None:
    world.hub.publish("org/slow", save_adapter(world.base, tmp_path / "slow", seed=9, **LORA))
    load(server, "leaving", "org/lora")
    wanted = request("abc", "leaving", new_tokens=100)
    alone = server.generation.Generate(wanted)
    world.hub.hangs["adapter_model.safetensors"] = 100
    slow = loading(server, "slow", "org/slow")
    try:
        assert world.hub.hanging.wait(SECONDS)
        with world.slow_steps():
            call = stream(server, wanted)
            tokens = [*next(message for message in call if message.chunk.token_ids).chunk.token_ids]
            unload(server, "leaving")
            refused(lambda: server.generation.Generate(wanted), "NOT_FOUND", "leaving")
        tokens += [t for m in call for t in m.chunk.token_ids]
        assert tokens == alone.token_ids
        assert not slow.done()
    finally:
        slow.cancel()
        world.hub.hangs.clear()
    assert "leaving" not in adapters(server)


def test_what_is_wrong_with_a_repository_is_said(server: Server, world: World, tmp_path: Path) -> None:
    folder = save_adapter(world.base, tmp_path / "bad", **LORA)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good, whole = config.read_text(), weights.read_bytes()

    def publish(name: str) -> str:
        world.hub.publish(f"org/{name}", folder)
        return f"org/{name}"

    weights.write_bytes(whole[:-8])
    refused(lambda: load(server, "bad", publish("truncated")), "DATA_LOSS", "adapter_model.safetensors")
    weights.write_bytes(whole)
    config.write_text(good.replace('"bias": "none"', '"bias": "boft_only"'))
    refused(lambda: load(server, "bad", publish("bias")), "FAILED_PRECONDITION", "bias")
    config.write_text(good.replace('"r": 4', '"r": 100000'))
    refused(lambda: load(server, "bad", publish("huge")), "INVALID_ARGUMENT", "r: 100000")
    config.write_text(good)
    weights.rename(folder / "adapter_model.bin")
    refused(lambda: load(server, "bad", publish("pickle")), "FAILED_PRECONDITION", "adapter_model.bin")
    refused(lambda: load(server, "bad", "org/absent"), "NOT_FOUND", "org/absent")
    refused(lambda: load(server, "bad", "org/lora", revision="absent"), "NOT_FOUND", "absent")
    refused(lambda: load(server, "bad", "org/lora", stack="absent"), "NOT_FOUND", "absent")
    refused(lambda: load(server, "a,b", "org/lora"), "INVALID_ARGUMENT", "name")
    refused(lambda: load(server, "bad", "/etc"), "INVALID_ARGUMENT", "/etc")
    refused(lambda: load(server, "bad", "else/lora"), "PERMISSION_DENIED", "else/lora")
    assert "bad" not in adapters(server)
    assert server.metrics()["lorarep_adapter_load_seconds_count{outcome=data_loss}{source=hub}"] == 1


def test_with_the_hub_gone_what_is_cached_is_served(server: Server, world: World) -> None:
    world.hub.status, world.hub.faulty = 503, ""
    try:
        assert load(server, "cached", "org/lora").name == "cached"
        refused(lambda: load(server, "other", "org/never-seen"), "UNAVAILABLE", "org/never-seen")
    finally:
        world.hub.status = None
        unload(server, "cached")


def test_a_second_revision_beside_the_first(server: Server, world: World, tmp_path: Path) -> None:
    first = world.hub.publish("org/moving", save_adapter(world.base, tmp_path / "1", seed=11, **LORA))
    second = world.hub.publish("org/moving", save_adapter(world.base, tmp_path / "2", seed=12, **LORA))
    assert [load(server, "v1", "org/moving", revision=first).commit, load(server, "v2", "org/moving").commit] == [
        first,
        second,
    ]
    answers = [server.generation.Generate(request("abc", name, new_tokens=16)).token_ids for name in ("v1", "v2")]
    assert answers[0] != answers[1]
    for name in ("v1", "v2"):
        unload(server, name)


def test_an_unloaded_adapters_memory_is_freed(server: Server) -> None:
    before = server.metrics()["lorarep_memory_bytes{category=adapters}"]
    size = load(server, "brief", "org/plain").bytes
    assert server.metrics()["lorarep_memory_bytes{category=adapters}"] == before + size
    unload(server, "brief")
    wait_for(lambda: server.metrics()["lorarep_memory_bytes{category=adapters}"] == before, "memory")
