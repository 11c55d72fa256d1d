"""The metrics that llm-d-router's endpoint picker reads, which the Gateway API Inference Extension's has become.

Its protocol (docs/plugin-metric-protocol.md): gauges of queued requests and of KV memory in use, and one sample whose
labels name the adapters of running and of waiting requests, joined by commas, and whose value is the time it was taken.
Of several samples the picker takes the latest, so a second one would hide the first. A later picker (pull request 2792
of llm-d-router) reads the adapters in memory, too, each with its level, and the time that it took to bring some there.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from lorarep.v1 import adapters_pb2
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.callers import request, stream
from tests.support.servers import SECONDS, Server, serving, wait_for
from tests.support.world import World

QUEUED, RUNNING = "lorarep_requests_waiting", "lorarep_requests_running"
KV_USAGE, LORA_INFO = "lorarep_kv_usage_ratio", "lorarep_lora_requests_info"


@dataclass(frozen=True)
class View:
    queued: float
    kv_usage: float
    most: int
    running: set[str]
    waiting: set[str]
    taken: float


def families_of(server: Server) -> dict[str, Metric]:
    with urllib.request.urlopen(server.metrics_url, timeout=SECONDS) as response:
        return {family.name: family for family in text_string_to_metric_families(response.read().decode())}


def loaded(server: Server) -> dict[str, tuple[str, str, str]]:
    """Level, pin and rank of each adapter in memory."""
    samples = families_of(server)["lorarep_lora_adapter_loaded"].samples
    assert {sample.value for sample in samples} <= {1}
    found = {s.labels["adapter_name"]: (s.labels["level"], s.labels["pinned"], s.labels["rank"]) for s in samples}
    assert len(found) == len(samples)
    return found


def loads(server: Server, transition: str) -> float:
    """The number of adapters that have come to the device."""
    samples = families_of(server)["lorarep_lora_adapter_load_seconds"].samples
    return sum(s.value for s in samples if s.name.endswith("_count") and s.labels["transition"] == transition)


def view(server: Server) -> View:
    families = families_of(server)
    assert {families[name].type for name in (QUEUED, KV_USAGE, LORA_INFO)} == {"gauge"}
    (queued,), (usage,), (info,) = (families[name].samples for name in (QUEUED, KV_USAGE, LORA_INFO))

    def names(label: str) -> set[str]:
        return {name for name in info.labels[label].split(",") if name}

    return View(
        queued.value,
        usage.value,
        int(info.labels["max_lora"]),
        names("running_lora_adapters"),
        names("waiting_lora_adapters"),
        info.value,
    )


@pytest.fixture(scope="module")
def narrow(world: World) -> Iterator[Server]:
    """A server that runs one request at a time. Its memory has room for two adapters, or a little more."""
    flags = [*world.flags(), "--max-sequences=1", "--allow-repository=org/*", "--adapter=lora=org/lora"]
    flags += ["--adapter-bytes=44KiB", "--adapter-host-bytes=1MiB"]
    with serving(flags, world.env) as server:
        yield server.wait_ready()


@pytest.mark.usefixtures("slow_steps")
def test_adapters_come_and_go(narrow: Server) -> None:
    idle = view(narrow)
    assert (idle.queued, idle.kv_usage, idle.most, idle.running, idle.waiting) == (
        0,
        0,
        1,
        set(),
        set(),
    )  # room for one as large as this

    first = stream(narrow, request("x", "lora", new_tokens=500))
    next(m for m in first if m.chunk.token_ids)
    busy = view(narrow)
    assert (busy.queued, busy.running, busy.waiting) == (0, {"lora"}, set())
    assert 0 < busy.kv_usage <= 1
    assert busy.taken > idle.taken

    list(
        narrow.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="hot", repository="org/dora"), timeout=SECONDS)
    )
    second = stream(narrow, request("x", "hot", new_tokens=500))
    next(second)
    full = view(narrow)
    assert (full.queued, full.running, full.waiting) == (1, {"lora"}, {"hot"})

    first.cancel()
    wait_for(lambda: view(narrow).running == {"hot"}, "the second to run")
    assert (view(narrow).queued, view(narrow).waiting) == (0, set())

    second.cancel()
    narrow.wait_idle()
    narrow.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="hot"), timeout=SECONDS)
    gone = view(narrow)
    assert (gone.queued, gone.kv_usage, gone.running, gone.waiting) == (0, 0, set(), set())


def test_residency_and_room_are_those_of_adapters_not_of_requests(narrow: Server) -> None:
    assert loaded(narrow) == {"lora": ("gpu", "false", "4")}
    before = loads(narrow, "load")
    load = adapters_pb2.LoadAdapterRequest(name="hot", repository="org/dora", pinned=True)
    list(narrow.adapters.LoadAdapter(load, timeout=SECONDS))
    assert loaded(narrow) == {"lora": ("gpu", "false", "4"), "hot": ("gpu", "true", "3")}
    assert view(narrow).most == 2  # of their mean size, in 44 KiB

    # An idle one leaves for another, and stays in host memory. Names are those that requests have.
    narrow.generation.Generate(request("x", "org/plain", new_tokens=1))
    assert loaded(narrow) == {
        "lora": ("cpu", "false", "4"),
        "hot": ("gpu", "true", "3"),
        "org/plain": ("gpu", "false", "2"),
    }
    assert (loads(narrow, "load"), loads(narrow, "activate")) == (before + 2, 0)

    narrow.generation.Generate(request("x", "lora", new_tokens=1))
    assert loaded(narrow)["lora"][0] == "gpu"
    assert (loads(narrow, "load"), loads(narrow, "activate")) == (before + 2, 1)

    narrow.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="hot"), timeout=SECONDS)
    assert "hot" not in loaded(narrow)
