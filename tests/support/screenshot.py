"""Takes the picture of docs/operations.md: `python -m tests.support.screenshot deploy/monitoring/page.png`.

The base is small and random, with 32 layers. The picture shows a live server.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorarep.v1 import generation_pb2 as pb

from tests.support.browser import chromium
from tests.support.callers import load, request, stream
from tests.support.hub_faults import FaultyHub
from tests.support.models import save_adapter, save_base
from tests.support.servers import Server, serving

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "metamath": dict(r=16, target_modules=ATTENTION, layer_replication=[[0, 24], [8, 32]]),
    "sql": dict(r=8, target_modules=ATTENTION, layer_replication=[[0, 24], [8, 32]], use_dora=True),
    "summaries": dict(r=8, target_modules=ATTENTION),
    "legal": dict(r=8, target_modules=ATTENTION, layer_replication=[[0, 16], [12, 20], [16, 32]]),
    "medical": dict(r=8, target_modules=ATTENTION, layer_replication=[[0, 16], [12, 20], [16, 32]]),
    "support": dict(r=4, target_modules=["q_proj", "v_proj"]),
    "french": dict(r=8, target_modules=["q_proj", "v_proj"]),
    "poetry": dict(r=16, target_modules=ATTENTION, layer_replication=[[0, 24], [8, 32]]),
}
STREAMS = ("metamath", "metamath", "sql", "summaries", "poetry", "base", "deep", "deep")
"""The adapters and stacks of the streams. Their loads evict other adapters from the device."""
SECONDS = 7.5
"""Seconds between the starts of two streams."""


def main(file: Path) -> None:
    with TemporaryDirectory() as folder, FaultyHub() as hub:
        base = save_base("llama", Path(folder, "base"), num_hidden_layers=32)
        hub.publish("tiny/llama-32-layers", base)
        for seed, (name, config) in enumerate(ADAPTERS.items()):
            hub.publish(f"tiny/{name}", save_adapter(base, Path(folder, name), seed=seed, **config))
        flags = ["--base=tiny/llama-32-layers", "--quantization=none", "--dtype=float32", f"--cache-dir={folder}/cache"]
        flags += ["--stack=deep=0-24,8-32", "--stack=thrice=0-20,12-20,12-32", "--allow-repository=tiny/*"]
        flags += ["--adapter-bytes=4400KiB", "--adapter-host-bytes=900KiB", "--kv-bytes=12MiB"]
        env = {"HF_ENDPOINT": hub.url, "OMP_NUM_THREADS": "1"}
        with serving([*flags, "--openai-listen=127.0.0.1:0"], env) as server:
            server.wait_ready()
            for name in sorted(ADAPTERS, key=STREAMS.__contains__):
                load(server, name, f"tiny/{name}", pinned=name == "metamath")
            take(server, file)


def take(server: Server, file: Path) -> None:
    over = threading.Event()

    def keep_busy(number: int, name: str) -> None:
        target: dict[str, Any] = dict(adapters=[pb.AdapterRef(name=name)]) if name in ADAPTERS else dict(stack=name)
        while not over.is_set():
            for _ in stream(server, request("Once upon a time", new_tokens=40 + 20 * number, **target)):
                pass

    threads = [threading.Thread(target=keep_busy, args=each) for each in enumerate(STREAMS)]
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1920, "height": 1080}, color_scheme="dark")
        page.goto(f"http://127.0.0.1:{server.openai_port}/")
        for thread in threads:
            thread.start()
            page.wait_for_timeout(1000 * SECONDS)
        page.screenshot(path=file)
        over.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
