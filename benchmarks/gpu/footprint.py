"""Where the device's memory goes, and how long base and adapters take from files to ready.

    python -m benchmarks.gpu.footprint [--quantization nf4] [--loads 5] [--json FILE] [--folder DIR] [--layers 32]
        [--device cuda]

Memory is what the driver says is taken, less what it said when there was nothing but a CUDA context, once the engine
has answered a long prompt and a full batch; and what the caching allocator has reserved by then. The base is loaded by
the engine first, when nothing is warm but the files, and then by `transformers` alone, when all is. Adapters of 48
positions, the published one's, are loaded one after the other into an idle engine. Run it in a process of its own, on
a GPU that nobody else uses. `--device cpu` does all but the memory with a small base.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.decode import lease, prompts, request
from benchmarks.gpu.goals import Figures, add_figure_options
from benchmarks.gpu.models import DEEP, Files, add_file_options, load_with_transformers
from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine

BATCH = 32
PROMPT = 2048
KINDS = {"published-lora": "lora", "published-dora": "dora"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    add_figure_options(parser)
    parser.add_argument("--loads", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Files(options.folder or Path(folder), options.layers, options.device), options)


def run(files: Files, options: argparse.Namespace) -> None:
    figures, device = Figures(options.json), options.device
    # Elsewhere: whoever makes them has memory on the device too.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(files, options.loads))
    maker.start()
    maker.join()
    for file in files.base.iterdir():
        file.read_bytes()  # both find it in the page cache
    empty = 0
    if device == "cuda":
        torch.zeros(1, device=device)
        torch.cuda.empty_cache()
        empty = taken()
    engine, ours = timed(lambda: start(files, options.quantization))
    memory: dict[str, Any] = {}
    if device == "cuda":
        memory = {f"ready_{name}": number for name, number in rests(engine, empty).items()}
    load_adapters(engine, files, options, figures)
    answer_all(engine)
    if device == "cuda":
        figures.put(f"{options.quantization}/memory", **memory, **report(engine, empty))
    del engine
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    _, theirs = timed(lambda: load_with_transformers(files.base, options.quantization, device))
    print(f"base to ready {ours:.1f} s, transformers' from_pretrained {theirs:.1f} s", flush=True)
    figures.put(
        f"{options.quantization}/load/base", ready_s=ours, transformers_s=theirs, longer_s=max(0.0, ours - theirs)
    )


def make(files: Files, loads: int) -> None:
    _ = files.base
    for kind in KINDS:
        for number in range(loads):
            files.adapter(kind, number)


def start(files: Files, quantization: str) -> Engine:
    return Engine(
        EngineConfig(
            BaseConfig(str(files.base), quantization=quantization, device=files.device),
            stacks=files.stacks,
            scheduler=SchedulerConfig(
                kv_bytes=(8 << 30) if files.device == "cuda" else (1 << 30), max_sequence_tokens=8192
            ),
        )
    )


def load_adapters(engine: Engine, files: Files, options: argparse.Namespace, figures: Figures) -> None:
    for kind, short in KINDS.items():
        seconds = []
        for number in range(options.loads):
            folder = str(files.adapter(kind, number))
            name = f"{kind}{number}"
            seconds.append(timed(lambda name=name, folder=folder: engine.adapters.load(name, folder, trusted=True))[1])
        took = statistics.median(seconds)
        print(f"{kind}: ready after {took * 1e3:.0f} ms, the first {seconds[0] * 1e3:.0f}", flush=True)
        figures.put(f"{options.quantization}/load/{short}", ms=took * 1e3, first_ms=seconds[0] * 1e3)


def answer_all(engine: Engine) -> None:
    """A full batch on adapters, and a long prompt."""
    names = [f"{kind}0" for kind in KINDS] * (BATCH // len(KINDS))
    engine.generate(
        (request(prompt, 24), lease(engine, name)) for prompt, name in zip(prompts(BATCH), names, strict=True)
    )
    engine.generate([(request((1,) * PROMPT, 8), lease(engine, DEEP))])


def taken() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def rests(engine: Engine, empty: int) -> dict[str, int]:
    """Bytes other than base, adapters, keys and values."""
    parts = engine.ledger().categories
    known = sum(size for name, size in parts.items() if name != "workspace")
    return {"device_rest": taken() - empty - known, "reserved_rest": torch.cuda.memory_reserved() - known}


def report(engine: Engine, empty: int) -> dict[str, Any]:
    ledger, allocated = engine.ledger(), torch.cuda.memory_allocated()
    kept = ("base_weights", "quantization_constants", "embeddings_and_head")
    base = sum(ledger.categories[name] for name in kept)
    rest = rests(engine, empty)
    apart = 100 * abs(ledger.total / allocated - 1)
    print({name: f"{size / 2**30:.3f} GiB" for name, size in ledger.categories.items()})
    print(f"ledger {ledger.total:,} bytes, allocator {allocated:,}: {apart:.2f} % apart")
    for name, size in rest.items():
        print(f"{name}: {size / 2**20:.0f} MiB, {100 * size / base:.1f} % of the base", flush=True)
    return {
        "base_bytes": base,
        "base_gib": base / 2**30,
        "ledger_apart": apart,
        **rest,
        "ledger": {**ledger.categories},
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    done = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done, time.perf_counter() - began


if __name__ == "__main__":
    main()
