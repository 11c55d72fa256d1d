"""What running streams notice of others, through the whole engine: prompts, loads, adapters that come and go, length.

    python benchmarks/beside.py [--device cuda] [--layers 32] [--quantization nf4] [--streams 8] [--adapters 1000]

The base has Mistral-7B's shape and random weights, each request its own LoRA of rank 8 on a stack of twice its depth:

- the first token of a long prompt, alone and beside streams, and the streams' time per token meanwhile;
- an adapter's way from files to ready, and the streams' longest gap meanwhile;
- a step at a long context, beside a short one and what reading the added keys and values costs at the bandwidth that
  copying reaches;
- tokens a second where requests draw from so many adapters by Zipf's law, of which a few fit on the device and the
  others are in host memory, beside the same requests over those that fit.

`--device cpu` does all of it with a small base.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.decode import copy_bandwidth, layers_of, request
from benchmarks.models import save_adapter, save_base
from lorarep_runtime.cache import PagePool
from lorarep_runtime.config import PAGE_TOKENS, AdapterLimits, BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine import Engine
from lorarep_runtime.request import Event, Output
from tests.models import MISTRAL_7B

SMALL = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
ON_DEVICE = 64
"""Adapters for which the device has room."""
SHORT = 128
STEADY = 40
"""Tokens of each stream before and after which nothing is timed."""


class Stream:
    """One request and when each of its tokens came."""

    def __init__(self, engine: Engine, adapter: str, prompt_tokens: int, new_tokens: int) -> None:
        self.times: list[float] = []
        self.ended = threading.Event()
        self._failure: Event | None = None
        self.began = time.perf_counter()
        generator = random.Random(prompt_tokens)
        prompt = tuple(generator.randrange(256) for _ in range(prompt_tokens))
        engine.submit(request(prompt, new_tokens), engine.adapters.lease([(adapter, 1.0)]), self._on_event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Output):
            self.times += [time.perf_counter()] * len(event.tokens)
        else:
            self._failure = event if isinstance(event, Exception) else None
            self.ended.set()

    def wait(self) -> Stream:
        self.ended.wait()
        if isinstance(self._failure, Exception):
            raise self._failure
        return self

    @property
    def first_token(self) -> float:
        return self.times[0] - self.began

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between tokens of which the later came between the two times."""
        return [b - a for a, b in pairwise(self.times) if begin <= b <= end]


@contextmanager
def running(engine: Engine, adapters: Sequence[str], new_tokens: int) -> Iterator[list[Stream]]:
    """Streams that are all decoding; afterwards they are waited for."""
    streams = [Stream(engine, name, SHORT, new_tokens) for name in adapters]
    while min(len(stream.times) for stream in streams) < STEADY:
        time.sleep(0.001)
    yield streams
    for stream in streams:
        stream.wait()


def beside(engine: Engine, adapters: Sequence[str], new_tokens: int, work: Callable[[], object]) -> str:
    """Runs `work` beside streams; what it did to their gaps."""
    with running(engine, adapters, new_tokens) as streams:
        calm = time.perf_counter()
        time.sleep(1)
        begin = time.perf_counter()
        work()
        for stream, had in [(stream, len(stream.times)) for stream in streams]:  # the gap that it ended in counts
            while len(stream.times) == had:
                if stream.ended.is_set():
                    raise SystemExit("a stream ended too early: more --new-tokens")
                time.sleep(0.001)
        end = time.perf_counter()
    usual = [gap for stream in streams for gap in stream.gaps(calm, begin)]
    during = [gap for stream in streams for gap in stream.gaps(begin, end)]
    before, meanwhile, longest = statistics.fmean(usual), statistics.fmean(during), max(during)
    return (
        f"a token {before * 1e3:.2f} ms before, {meanwhile * 1e3:.2f} meanwhile, {meanwhile / before:.2f} times; "
        f"longest gap {longest * 1e3:.1f} ms, {longest / statistics.median(usual):.1f} times the median"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=600)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--long", type=int, default=8192)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options)


def run(folder: Path, options: argparse.Namespace) -> None:
    device, layers = options.device, options.layers
    shape = {**MISTRAL_7B, **(SMALL if device == "cpu" else {}), "num_hidden_layers": layers}
    half, quarter = layers // 2, layers // 4
    replication = [[0, half], [quarter, quarter * 3], [half, layers], [half, layers]]
    base = save_base(folder / "base", shape, device)
    kinds = 1 + options.streams
    for i in range(kinds):
        save_adapter(folder / f"{i}", shape, replication, rank=8, dora=False, seed=i, device=device)
    size = (folder / "0" / "adapter_model.safetensors").stat().st_size
    engine = Engine(
        EngineConfig(
            BaseConfig(str(base), quantization=options.quantization, device=device),
            # A copy has alignment beside what its file has.
            adapters=AdapterLimits(device_bytes=ON_DEVICE * size * 21 // 20, host_bytes=2 * options.adapters * size),
            scheduler=SchedulerConfig(
                max_sequence_tokens=options.long,
                max_sequences=max(32, options.streams),
                kv_bytes=(8 << 30) if device == "cuda" else (1 << 30),
            ),
        )
    )

    def load(name: str, source: int) -> None:
        engine.adapters.load(name, str(folder / f"{source}"), trusted=True)

    streams = [f"stream{i}" for i in range(options.streams)]
    for i, name in enumerate(streams):
        load(name, 1 + i)
    load("prompt", 0)
    engine.start()
    Stream(engine, "prompt", options.prompt, 2).wait()  # all that is made on first use is made

    alone = statistics.median(Stream(engine, "prompt", options.prompt, 2).wait().first_token for _ in range(5))
    print(f"prompt of {options.prompt} tokens alone: first token after {alone * 1e3:.0f} ms", flush=True)
    times: list[float] = []
    noticed = beside(
        engine,
        streams,
        options.new_tokens,
        lambda: times.append(Stream(engine, "prompt", options.prompt, 2).wait().first_token),
    )
    print(f"beside {options.streams} streams: after {times[0] * 1e3:.0f} ms; {noticed}", flush=True)

    times.clear()

    def timed_load() -> None:
        began = time.perf_counter()
        load("late", 0)
        times.append(time.perf_counter() - began)

    noticed = beside(engine, streams, options.new_tokens, timed_load)
    print(f"an adapter loaded beside them: ready after {times[0] * 1e3:.0f} ms; {noticed}", flush=True)

    def step(prompt_tokens: int) -> float:
        stream = Stream(engine, "prompt", prompt_tokens, 2 * STEADY + 64).wait()
        return statistics.median(stream.gaps(stream.times[STEADY], stream.times[-STEADY]))

    context = options.long - 2 * STEADY - 64
    short, long = step(SHORT), step(context)
    token = PagePool.page_bytes(engine.base.kv_heads, engine.base.head_dim, engine.base.dtype) // PAGE_TOKENS
    added = (context - SHORT) * token * len(layers_of(replication))
    line = f"a step at {context} tokens {long * 1e3:.2f} ms, at {SHORT} {short * 1e3:.2f}"
    if device == "cuda":
        floor = added / copy_bandwidth(device)
        line += (
            f"; reading the added {added / 1e9:.2f} GB costs {floor * 1e3:.2f} ms, {(long - short) / floor:.2f} times"
        )
    print(line, flush=True)

    names = [f"one of many {i}" for i in range(options.adapters)]
    for i, name in enumerate(tqdm(names, desc="adapters")):
        load(name, i % kinds)
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(names))))
    drawn = random.Random(0).choices(range(len(names)), cum_weights=weights, k=options.requests)
    fitting = ON_DEVICE // 2  # none of these leaves for another
    few = throughput(engine, [names[i % fitting] for i in drawn])
    many = throughput(engine, [names[i] for i in drawn])
    print(
        f"{options.requests} requests over {len(set(drawn))} of {options.adapters} adapters: {many:.0f} tokens/s; "
        f"over {fitting} that stay on the device {few:.0f}: {many / few:.2f} times"
    )
    engine.stop()


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
