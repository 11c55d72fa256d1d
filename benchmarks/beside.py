"""What running streams notice of others, through the whole engine: prompts, loads, adapters that come and go, length.

    python benchmarks/beside.py [--quantization nf4] [--parts prompt,loads,long,zipf] [--streams 8] [--adapters 1000]
        [--temperature 0] [--name beside] [--json FILE] [--folder DIR] [--layers 32] [--device cuda]

The base has Mistral-7B's shape and random weights, each stream its own LoRA of rank 8 on a stack of twice its depth:

- the first token of a long prompt, alone and beside streams, and the streams' time per token meanwhile;
- an adapter's way from files to ready, of rank 8 and 48 positions as the published one is, LoRA and DoRA, and the
  streams' longest gap meanwhile;
- a step at a long context, beside a short one and what reading the added keys and values costs at the bandwidth that
  copying reaches;
- tokens a second where requests draw from so many adapters of that size by Zipf's law, of which 64 fit on the device
  and the others are in host memory, beside the same requests over half of those that fit.

At a `--temperature` the streams' tokens are drawn. `--device cpu` does all of it with a small base.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.decode import add_temperature
from benchmarks.floor import copy_bandwidth, token_bytes
from benchmarks.goals import Figures, add_figure_options
from benchmarks.models import DEEP, Files, add_file_options
from benchmarks.streams import SHORT, STEADY, Noticed, Stream, beside
from lorarep_runtime.config import AdapterLimits, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine

ON_DEVICE = 64
"""Adapters for which the device has room."""
PARTS = ("prompt", "loads", "long", "zipf")
PROMPTER = "prompt"
PROMPTS, LOADS = 3, 8
"""How often each is done beside streams, to whom the worst counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    add_figure_options(parser)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--name", default="beside", help="Of the figures in the file.")
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
                # A copy has alignment beside what its file has.
                adapters=AdapterLimits(
                    device_bytes=ON_DEVICE * size * 21 // 20, host_bytes=2 * options.adapters * size
                ),
                scheduler=SchedulerConfig(
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
        self.prompt_seconds()  # all that is made on first use is made
        for part in self.options.parts:
            getattr(self, part)()
        self.engine.stop()

    def load(self, name: str, kind: str, number: int) -> None:
        self.engine.adapters.load(name, str(self.files.adapter(kind, number)), trusted=True)

    def put(self, name: str, **numbers: Any) -> None:
        self.figures.put(f"{self.options.quantization}/{self.options.name}/{name}", **numbers)

    def beside(self, work: Callable[[], object]) -> Noticed:
        return beside(self.engine, self.streams, self.options.new_tokens, self.options.temperature, work)

    def prompt_seconds(self) -> float:
        return Stream(self.engine, PROMPTER, self.options.prompt, 2).wait().first_token

    def prompt(self) -> None:
        alone = statistics.median(self.prompt_seconds() for _ in range(5))
        print(f"prompt of {self.options.prompt} tokens alone: first token after {alone * 1e3:.0f} ms", flush=True)
        times: list[float] = []
        # The first time that another row decodes its graph is captured: that is in the first of them.
        seen = [self.beside(lambda: times.append(self.prompt_seconds())) for _ in range(PROMPTS)]
        for took, noticed in zip(times, seen, strict=True):
            print(f"beside {self.options.streams} streams: after {took * 1e3:.0f} ms; {noticed}", flush=True)
        self.put(
            "prompt",
            alone_ms=alone * 1e3,
            beside_ms=statistics.median(times) * 1e3,
            slower=max(noticed.slower for noticed in seen),
            longest_ms=max(noticed.longest for noticed in seen) * 1e3,
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
            seen = [self.beside(timed_load) for _ in range(LOADS)]
            for took, noticed in zip(times, seen, strict=True):
                print(f"a {kind} loaded beside them: ready after {took * 1e3:.0f} ms; {noticed}", flush=True)
            ready, gaps = statistics.median(times), [noticed.longest_gap for noticed in seen]
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
