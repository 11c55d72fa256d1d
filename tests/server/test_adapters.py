"""Adapters that come and go while others stream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from lorarep.v1 import adapters_pb2 as pb

from tests.models import save_adapter
from tests.server.conftest import ADAPTERS, World
from tests.server.running import SECONDS, Server, request, stream, wait_for

LORA = ADAPTERS["lora"]


@pytest.fixture
def load(server: Server) -> Callable[..., pb.Adapter]:
    return lambda name, repository, **more: (
        server.adapters.LoadAdapter(
            pb.LoadAdapterRequest(name=name, repository=repository, **more), timeout=SECONDS
        ).adapter
    )


def refused(call: Callable[[], object], code: str, named: str) -> None:
    with pytest.raises(grpc.RpcError) as error:
        call()
    assert error.value.code().name == code
    assert named in error.value.details()


def test_an_adapter_from_load_to_unload(server: Server, world: World, load: Callable[..., pb.Adapter]) -> None:
    commit = world.hub.repositories["org/plain"].refs["main"]
    loaded = load("mine", "org/plain")
    assert (loaded.name, loaded.repository, loaded.commit, loaded.loaded) == ("mine", "org/plain", commit, True)
    assert (loaded.kind, loaded.rank, list(loaded.layers)) == (pb.ADAPTER_KIND_LORA, 2, list(range(6)))
    assert loaded.parameters == 6 * 2 * (64 + 128)
    assert load("mine", "org/plain") == loaded  # again, unchanged
    refused(lambda: load("mine", "org/lora"), "ALREADY_EXISTS", "mine")
    assert server.adapters.GetAdapter(pb.GetAdapterRequest(name="mine")).adapter == loaded
    names = [a.name for a in server.adapters.ListAdapters(pb.ListAdaptersRequest()).adapters]
    assert {"lora", "dora", "mine"} <= set(names)
    assert names == sorted(names)
    server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="mine"))
    refused(lambda: server.adapters.GetAdapter(pb.GetAdapterRequest(name="mine")), "NOT_FOUND", "mine")
    refused(lambda: server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="mine")), "NOT_FOUND", "mine")


def test_a_stream_goes_on_while_an_adapter_is_downloaded_and_one_is_unloaded(
    server: Server, world: World, tmp_path: Path, load: Callable[..., pb.Adapter]
) -> None:
    world.hub.publish("org/slow", save_adapter(world.base, tmp_path / "slow", seed=9, **LORA))
    load("leaving", "org/lora")
    wanted = request("abc", "leaving", new_tokens=100)
    alone = server.generation.Generate(wanted)
    world.hub.hangs["adapter_model.safetensors"] = 100
    slow = server.adapters.LoadAdapter.future(pb.LoadAdapterRequest(name="slow", repository="org/slow"))
    try:
        assert world.hub.hanging.wait(SECONDS)
        call = stream(server, wanted)
        next(call)
        server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="leaving"))
        refused(lambda: server.generation.Generate(wanted), "NOT_FOUND", "leaving")
        assert [t for m in call for t in m.chunk.token_ids] == alone.token_ids
        assert not slow.done()
    finally:
        slow.cancel()
        world.hub.hangs.clear()
    assert "leaving" not in {a.name for a in server.adapters.ListAdapters(pb.ListAdaptersRequest()).adapters}


def test_what_is_wrong_with_a_repository_is_said(
    server: Server, world: World, tmp_path: Path, load: Callable[..., pb.Adapter]
) -> None:
    folder = save_adapter(world.base, tmp_path / "bad", **LORA)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good, whole = config.read_text(), weights.read_bytes()

    def publish(name: str) -> str:
        world.hub.publish(f"org/{name}", folder)
        return f"org/{name}"

    weights.write_bytes(whole[:-8])
    refused(lambda: load("bad", publish("truncated")), "DATA_LOSS", "adapter_model.safetensors")
    weights.write_bytes(whole)
    config.write_text(good.replace('"bias": "none"', '"bias": "all"'))
    refused(lambda: load("bad", publish("bias")), "FAILED_PRECONDITION", "bias")
    config.write_text(good.replace('"r": 4', '"r": 100000'))
    refused(lambda: load("bad", publish("huge")), "INVALID_ARGUMENT", "r: 100000")
    config.write_text(good)
    weights.rename(folder / "adapter_model.bin")
    refused(lambda: load("bad", publish("pickle")), "FAILED_PRECONDITION", "adapter_model.bin")
    refused(lambda: load("bad", "org/absent"), "NOT_FOUND", "org/absent")
    refused(lambda: load("bad", "org/lora", revision="absent"), "NOT_FOUND", "absent")
    refused(lambda: load("bad", "org/lora", stack="absent"), "NOT_FOUND", "absent")
    refused(lambda: load("a,b", "org/lora"), "INVALID_ARGUMENT", "name")
    refused(lambda: load("bad", "/etc"), "INVALID_ARGUMENT", "/etc")
    refused(lambda: load("bad", "else/lora"), "PERMISSION_DENIED", "else/lora")
    assert "bad" not in {a.name for a in server.adapters.ListAdapters(pb.ListAdaptersRequest()).adapters}
    assert server.metrics()["lorarep_adapter_load_seconds_count{outcome=data_loss}{source=hub}"] == 1


def test_with_the_hub_gone_what_is_cached_is_served(
    server: Server, world: World, load: Callable[..., pb.Adapter]
) -> None:
    world.hub.status, world.hub.faulty = 503, ""
    try:
        assert load("cached", "org/lora").name == "cached"
        refused(lambda: load("other", "org/never-seen"), "UNAVAILABLE", "org/never-seen")
    finally:
        world.hub.status = None
        server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="cached"))


def test_a_second_revision_beside_the_first(
    server: Server, world: World, tmp_path: Path, load: Callable[..., pb.Adapter]
) -> None:
    first = world.hub.publish("org/moving", save_adapter(world.base, tmp_path / "1", seed=11, **LORA))
    second = world.hub.publish("org/moving", save_adapter(world.base, tmp_path / "2", seed=12, **LORA))
    assert [load("v1", "org/moving", revision=first).commit, load("v2", "org/moving").commit] == [first, second]
    answers = [server.generation.Generate(request("abc", name, new_tokens=16)).token_ids for name in ("v1", "v2")]
    assert answers[0] != answers[1]
    for name in ("v1", "v2"):
        server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name=name))


def test_an_unloaded_adapters_memory_is_freed(server: Server, load: Callable[..., pb.Adapter]) -> None:
    before = server.metrics()["lorarep_memory_bytes{category=adapters}"]
    size = load("brief", "org/plain").bytes
    assert server.metrics()["lorarep_memory_bytes{category=adapters}"] == before + size
    server.adapters.UnloadAdapter(pb.UnloadAdapterRequest(name="brief"))
    wait_for(lambda: server.metrics()["lorarep_memory_bytes{category=adapters}"] == before, "memory")
