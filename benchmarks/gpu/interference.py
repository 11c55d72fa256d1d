"""How other work slows running streams down, through the whole engine: prompts, loads, long contexts, many adapters.

    python -m benchmarks.gpu.interference [--quantization nf4] [--parts prompt,loads,long,zipf] [--streams 8]
        [--adapters 1000] [--temperature 0] [--name interference] [--json FILE] [--folder DIR] [--layers 32]
        [--device cuda]

The base has Mistral-7B's shape and random weights, each stream its own LoRA of rank 8 on a stack of twice its depth:

- the first token of a long prompt, alone and with streams running, and the streams' time per token meanwhile;
- the time of an adapter from files to ready, LoRA and DoRA, of rank 8 and 48 positions as the published one has, and
  the streams' longest gap meanwhile;
- a step at a long context, less one at a short context, over the time that reading the added keys and values takes at
  the bandwidth of a copy;
- tokens a second of requests that draw their adapters by Zipf's law, while 64 of them fit on the device and the others
  stay in host memory, over tokens a second of the same requests on 32 adapters that stay on the device.

At a `--temperature` the streams' tokens are drawn. `--device cpu` does all of it with a small base.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.gpu.decode import add_temperature
from benchmarks.gpu.floor import copy_bandwidth, token_bytes
from benchmarks.gpu.goals import Figures, add_figure_options
from benchmarks.gpu.models import DEEP, Files, add_file_options
from benchmarks.gpu.streams import SHORT, STEADY, Slowdown, Stream, measure_slowdown
from lorarep_runtime.config import AdapterLimits, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine

ON_DEVICE = 64
"""Adapters for which the device has room."""
PARTS = ("prompt", "loads", "long", "zipf")
PROMPTER = "prompt"
PROMPTS, LOADS = 3, 8
"""How often each runs while streams decode. The worst counts for the streams."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    add_figure_options(parser)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--name", default="interference", help="The figures' name in the file.")
    add_temperature(parser)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=600)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--long", type=int, default=8192)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Run(Files(options.folder or Path(folder), options.layers, options.device), options).all()


class Run:
    def __init__(self, files: Files, options: argparse.Namespace) -> None:
        self.files, self.options = files, options
        self.figures = Figures(options.json)
        size = (files.adapter("published-lora", 0) / "adapter_model.safetensors").stat().st_size
        self.engine = Engine(
            EngineConfig(
                BaseConfig(str(files.base), quantization=options.quantization, device=options.device),
                # A copy takes its file's bytes and alignment.
                adapters=AdapterLimits(
                    device_bytes=ON_DEVICE * size * 21 // 20, host_bytes=2 * options.adapters * size
                ),
                scheduler=SchedulerConfig(
                    prefix_cache=False,  # what is measured is computed
                    max_sequence_tokens=options.long,
                    max_sequences=max(32, options.streams),
                    kv_bytes=(8 << 30) if options.device == "cuda" else (1 << 30),
                ),
            )
        )
        self.streams = [f"stream{i}" for i in range(options.streams)]

    def all(self) -> None:
        for i, name in enumerate([PROMPTER, *self.streams]):
            self.load(name, "lora", i)
        self.engine.start()
        self.prompt_seconds()  # warms up kernels and graphs
        for part in self.options.parts:
            getattr(self, part)()
        self.engine.stop()

    def load(self, name: str, kind: str, number: int) -> None:
        self.engine.adapters.load(name, str(self.files.adapter(kind, number)), trusted=True)

    def put(self, name: str, **numbers: Any) -> None:
        self.figures.put(f"{self.options.quantization}/{self.options.name}/{name}", **numbers)

    def slowdown(self, work: Callable[[], object]) -> Slowdown:
        return measure_slowdown(self.engine, self.streams, self.options.new_tokens, self.options.temperature, work)

    def prompt_seconds(self) -> float:
        return Stream(self.engine, PROMPTER, self.options.prompt, 2).wait().first_token

    def prompt(self) -> None:
        alone = statistics.median(self.prompt_seconds() for _ in range(5))
        print(f"prompt of {self.options.prompt} tokens alone: first token after {alone * 1e3:.0f} ms", flush=True)
        times: list[float] = []
        # The first run includes the capture of the graph with one row more.
        slowdowns = [self.slowdown(lambda: times.append(self.prompt_seconds())) for _ in range(PROMPTS)]
        for took, slowdown in zip(times, slowdowns, strict=True):
            print(f"with {self.options.streams} streams: after {took * 1e3:.0f} ms; {slowdown}", flush=True)
        self.put(
            "prompt",
            alone_ms=alone * 1e3,
            shared_ms=statistics.median(times) * 1e3,
            slower=max(slowdown.slower for slowdown in slowdowns),
            longest_ms=max(slowdown.longest for slowdown in slowdowns) * 1e3,
        )

    def loads(self) -> None:
        for kind in ("lora", "dora"):
            times: list[float] = []

            def timed_load(kind: str = kind, times: list[float] = times) -> None:
                began = time.perf_counter()
                self.load(f"late {kind} {len(times)}", f"published-{kind}", len(times))
                times.append(time.perf_counter() - began)

            for number in range(LOADS):
                self.files.adapter(f"published-{kind}", number)
            slowdowns = [self.slowdown(timed_load) for _ in range(LOADS)]
            for took, slowdown in zip(times, slowdowns, strict=True):
                print(f"a {kind} loaded meanwhile: ready after {took * 1e3:.0f} ms; {slowdown}", flush=True)
            ready, gaps = statistics.median(times), [slowdown.longest_gap for slowdown in slowdowns]
            self.put(kind, ready_ms=ready * 1e3, longest_gap=max(gaps), longest_gaps=gaps)

    def long(self) -> None:
        def step(prompt_tokens: int) -> float:
            stream = Stream(self.engine, PROMPTER, prompt_tokens, 2 * STEADY + 64).wait()
            return statistics.median(stream.gaps(stream.times[STEADY], stream.times[-STEADY]))

        context = self.options.long - 2 * STEADY - 64
        short, long = step(SHORT), step(context)
        added = (context - SHORT) * token_bytes(self.engine) * len(self.files.stacks[DEEP])
        floor = added / copy_bandwidth(self.options.device)
        floors = (long - short) / floor
        print(
            f"a step at {context} tokens {long * 1e3:.2f} ms, at {SHORT} {short * 1e3:.2f}; "
            f"reading the added {added / 1e9:.2f} GB costs {floor * 1e3:.2f} ms, {floors:.2f} times",
            flush=True,
        )
        self.put("long", ms=long * 1e3, short_ms=short * 1e3, added_bytes=added, floor_ms=floor * 1e3, floors=floors)

    def zipf(self) -> None:
        options = self.options
        names = [f"one of many {i}" for i in range(options.adapters)]
        for i, name in enumerate(tqdm(names, desc="adapters", mininterval=5)):
            self.load(name, "published-lora", i)
        weights = list(accumulate(1 / (rank + 1) for rank in range(len(names))))
        drawn = random.Random(0).choices(range(len(names)), cum_weights=weights, k=options.requests)
        fitting = min(len(names), ON_DEVICE // 2)  # none of these leaves for another
        few = throughput(self.engine, [names[i % fitting] for i in drawn])
        many = throughput(self.engine, [names[i] for i in drawn])
        distinct = len(set(drawn))
        print(
            f"{options.requests} requests over {distinct} of {options.adapters} adapters: {many:.0f} tokens/s; "
            f"over {fitting} that stay on the device {few:.0f}: {many / few:.2f} times",
            flush=True,
        )
        self.put("zipf", many=many, few=few, kept=many / few, adapters=options.adapters, used=distinct)


def throughput(engine: Engine, adapters: Sequence[str]) -> float:
    """Tokens a second of requests that all come at once."""
    for name in set(adapters[:ON_DEVICE]):
        Stream(engine, name, SHORT, 2).wait()
    began = time.perf_counter()
    streams = [Stream(engine, name, SHORT, SHORT) for name in adapters]
    tokens = sum(len(stream.wait().times) for stream in streams)
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
