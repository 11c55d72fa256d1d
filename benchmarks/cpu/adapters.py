"""Thousands of adapters over one small base on the CPU: what a request waits for its adapter, by where that is.

    python -m benchmarks.cpu.adapters [--registered 10000] [--used 2000] [--device-adapters 64] [--host-adapters 512]
        [--minutes 10]

A Hub on loopback publishes all of them, and each is loaded under a name. Requests draw names by Zipf's law, eight at a
time, until enough different ones have been used; a few dozen fit on the device and some hundreds in host memory, so the
others come and go. Every answer is compared with that of the same adapter earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from lorarep_server.demo.hub_stand_in import HubStandIn
from tqdm import tqdm

from lorarep_runtime.config import AdapterLimits, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.request import Event, Finished, Output, Request, Stopping
from tests.support.models import save_adapter, save_base

AT_ONCE = 8
PROMPT = tuple(range(40, 60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registered", type=int, default=10_000)
    parser.add_argument("--used", type=int, default=2_000)
    parser.add_argument("--device-adapters", type=int, default=64)
    parser.add_argument("--host-adapters", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, HubStandIn() as hub:
        os.environ.update(HF_ENDPOINT=hub.url, NO_PROXY="127.0.0.1", HF_HUB_DISABLE_TELEMETRY="1")
        run(Path(folder), hub, options)


def run(folder: Path, hub: HubStandIn, options: argparse.Namespace) -> None:
    base = save_base("llama", folder / "base")
    made = save_adapter(
        base, folder / "adapter", r=4, target_modules=["q_proj", "v_proj"], layer_replication=[[0, 4], [2, 6]]
    )
    config = json.loads((made / "adapter_config.json").read_text())
    for i in range(options.registered):
        # Each is its own: another scale.
        (made / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1 + i * 16 / options.registered}))
        hub.publish(f"many/adapter-{i}", made)
    probe = Engine(EngineConfig(BaseConfig(str(base), device="cpu"), scheduler=SchedulerConfig(kv_bytes=16 << 20)))
    size = probe.adapters.load("probe", str(made), trusted=True).bytes
    engine = Engine(
        EngineConfig(
            BaseConfig(str(base), device="cpu"),
            adapters=AdapterLimits(
                device_bytes=size * options.device_adapters,
                host_bytes=size * options.host_adapters,
            ),
            scheduler=SchedulerConfig(kv_bytes=16 << 20, prefix_cache=False),
        )
    )
    names = [f"adapter-{i}" for i in range(options.registered)]
    began = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as loaders:
        loads = loaders.map(lambda name: engine.adapters.load(name, f"many/{name}", trusted=True), names)
        for _ in tqdm(loads, "adapters", len(names)):
            pass
    loading = time.perf_counter() - began
    engine.start()
    popularity = 1 / np.arange(1, options.registered + 1)
    dice = np.random.default_rng(0)
    lock = threading.Lock()
    answers: dict[str, tuple[int, ...]] = {}
    firsts: dict[str, list[float]] = {"device": [], "host": [], "disk": []}
    wrong: list[str] = []
    memory = [psutil.Process().memory_info().rss]
    until = time.monotonic() + 60 * options.minutes

    def ask(name: str) -> None:
        began = time.perf_counter()
        tier = engine.adapters.get(name).tier
        first, tokens = answer(engine, name, began)
        with lock:
            firsts[tier].append(first)
            if answers.setdefault(name, tokens) != tokens:
                wrong.append(name)

    with ThreadPoolExecutor(AT_ONCE) as callers:
        while len(answers) < options.used and time.monotonic() < until:
            drawn = dice.choice(options.registered, size=AT_ONCE * 4, p=popularity / popularity.sum())
            list(callers.map(ask, [names[i] for i in drawn]))
            memory.append(psutil.Process().memory_info().rss)
    engine.stop()
    requests = sum(map(len, firsts.values()))
    print(f"{options.registered} adapters downloaded and loaded in {loading:.0f} s")
    print(f"{len(answers)} used by {requests} requests, {len(wrong)} wrong")
    print(
        f"{engine.adapters.residency.evictions} evictions; on the device is room for {options.device_adapters} of "
        f"{size} bytes, in host memory for {options.host_adapters}"
    )
    for tier, seconds in firsts.items():
        if seconds:
            median, late = statistics.median(seconds), sorted(seconds)[int(len(seconds) * 0.99)]
            print(
                f"first token, adapter from {tier}: {len(seconds)} requests, median {median * 1e3:.0f} ms, "
                f"99 % {late * 1e3:.0f} ms"
            )
    print(f"resident before the first request {memory[0] >> 20} MiB, after the last {memory[-1] >> 20} MiB")
    if wrong or len(answers) < options.used:
        raise SystemExit(1)


def answer(engine: Engine, name: str, began: float) -> tuple[float, tuple[int, ...]]:
    """Seconds to the first token, and the tokens."""
    ended = threading.Event()
    times: list[float] = []
    tokens: list[int] = []
    failed: list[Exception] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Output):
            times.append(time.perf_counter() - began)
            tokens.extend(event.tokens)
            return
        if not isinstance(event, Finished):
            failed.append(event)
        ended.set()

    lease = engine.adapters.lease([(name, 1.0)])
    engine.submit(Request(PROMPT, stopping=Stopping(max_new_tokens=8, ignore_eos=True)), lease, on_event)
    ended.wait()
    if failed:
        raise failed[0]
    return times[0], tuple(tokens)


if __name__ == "__main__":
    main()
