"""Many requests offered at once, and lone prompts: tokens a second, and milliseconds to the first token.

    python -m benchmarks.gpu.load [--requests 64,256] [--adapters 0,32] [--prompts 16,128,512,2048]
        [--rounds 5] [--layers 32] [--quantization nf4] [--deterministic] [--name load] [--json FILE] [--folder DIR]
        [--device cuda]

The base has Mistral-7B's shape and random weights; all requests walk a stack of twice its depth. `load_lengths.json`
has the tokens of each request's prompt and answer, drawn from log-normal distributions; other numbers of requests take
those of 256, over and over. Requests are greedy and end where their answers do. Request i of those with n adapters
computes with adapter i mod n. Prompts are random tokens.

A first round of each load is not timed. Lone prompts have a LoRA each, and nothing else runs: the median of some
rounds. `--device cpu` does all of it with a small base and eight requests, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks.gpu.decode import add_deterministic, lease, load, numbers, request
from benchmarks.gpu.goals import Figures, add_figure_options
from benchmarks.gpu.models import DEEP, Files, add_file_options
from lorarep_runtime.config import BaseConfig, EngineConfig, SchedulerConfig
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.model.kv_cache import KVShape, pages_of
from lorarep_runtime.request import Event, Finished, Output

LENGTHS = Path(__file__).with_name("load_lengths.json")
SMALL_REQUESTS, SMALL_TOKENS = 8, 24
"""Requests and their most tokens on the CPU."""


@dataclass
class Answer:
    """When a request was offered, and its tokens came."""

    offered: float
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    error: Exception | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def on_event(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Output):
            self.first = self.first or now
            self.last = now
            self.tokens += event.tokens
        else:
            self.error = None if isinstance(event, Finished) else event
            self.ended.set()

    def wait(self) -> Answer:
        self.ended.wait()
        if self.error is not None:
            raise SystemExit(f"a request failed: {self.error}")
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_file_options(parser)
    add_figure_options(parser)
    parser.add_argument("--requests", type=numbers, default=[64, 256])
    parser.add_argument("--adapters", type=numbers, default=[0, 32])
    parser.add_argument("--prompts", type=numbers, default=[16, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    add_deterministic(parser)
    parser.add_argument("--name", default="load", help="The figures' name in the file.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Files(options.folder or Path(folder), options.layers, options.device), options)


def run(files: Files, options: argparse.Namespace) -> None:
    figures, prefix = Figures(options.json), f"{options.quantization}/{options.name}"
    small = options.device == "cpu"
    counts = [SMALL_REQUESTS] if small else options.requests
    loads = {count: lengths_of(count, small) for count in counts}
    engine = started(files, options.quantization, loads, deterministic=options.deterministic)
    names = load(engine, files, "lora", max(1, *options.adapters)) if max(options.adapters, default=0) else []
    if options.prompts and not names:
        names = load(engine, files, "lora", 1)
    engine.start()
    try:
        for tokens in [SMALL_TOKENS] if small else options.prompts:
            took = [first_token(engine, tokens, names[i % len(names)], i) for i in range(options.rounds + 1)][1:]
            ms = statistics.median(took) * 1e3
            figures.put(f"{prefix}/prompt/{tokens}", ms=ms)
            print(f"first token of a lone prompt of {tokens:5} tokens: {ms:8.1f} ms", flush=True)
        for count, lengths in loads.items():
            for adapters in options.adapters:
                chosen = [names[i % adapters] if adapters else DEEP for i in range(count)]
                offered(engine, lengths, chosen)
                rate, firsts = offered(engine, lengths, chosen)
                p50, p99 = (quantile(firsts, share) * 1e3 for share in (0.5, 0.99))
                figures.put(f"{prefix}/{adapters} LoRAs/{count}", tokens_per_s=rate, first_p50_ms=p50, first_p99_ms=p99)
                print(
                    f"{count} requests, {adapters} LoRAs: {rate:8.0f} tokens/s, first token {p50:8.0f} ms median, "
                    f"{p99:8.0f} ms 99th percentile",
                    flush=True,
                )
    finally:
        engine.stop()


def lengths_of(count: int, small: bool) -> Sequence[tuple[int, int]]:
    """Tokens of the prompt and of the answer, for each of so many requests."""
    known = json.loads(LENGTHS.read_text())["requests"]
    if small:
        return [(min(a, SMALL_TOKENS), min(b, SMALL_TOKENS)) for a, b in known["32"][:count]]
    return [(a, b) for a, b in known[str(count)]] if str(count) in known else list(islice(cycle(known["256"]), count))


def started(
    files: Files, quantization: str, loads: dict[int, Sequence[tuple[int, int]]], *, deterministic: bool = False
) -> Engine:
    """An engine with pages for all requests of each load at once."""
    base, positions, shape = files.base, len(files.stacks[DEEP]), files.shape
    page = KVShape(shape["num_key_value_heads"], *2 * [shape["head_dim"]]).page_bytes(torch.bfloat16)
    pages = max((sum(pages_of(a + b) for a, b in lengths) for lengths in loads.values()), default=0)
    return Engine(
        EngineConfig(
            BaseConfig(str(base), quantization=quantization, device=files.device),
            stacks=files.stacks,
            scheduler=SchedulerConfig(
                prefix_cache=False,  # what is measured is computed
                kv_bytes=max((pages + 300) * positions * page, 1 << 30),
                max_sequence_tokens=min(8192, shape["max_position_embeddings"]),
                max_sequences=max(loads, default=32),
            ),
            deterministic=deterministic,
        )
    )


def prompt(tokens: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (tokens,), generator=generator).tolist())


def first_token(engine: Engine, tokens: int, name: str, seed: int) -> float:
    """Seconds to the first token of a prompt that is alone."""
    answer = Answer(time.perf_counter())
    engine.submit(request(prompt(tokens, seed), 4), lease(engine, name), answer.on_event)
    return answer.wait().first - answer.offered


def offered(engine: Engine, lengths: Sequence[tuple[int, int]], names: Sequence[str]) -> tuple[float, list[float]]:
    """Tokens a second from the offer to the last token, and the seconds to each request's first token."""
    asked = [
        (request(prompt(into, i), out), lease(engine, name))
        for i, ((into, out), name) in enumerate(zip(lengths, names, strict=True))
    ]
    began = time.perf_counter()
    answers = [Answer(began) for _ in asked]
    for (one, held), answer in zip(asked, answers, strict=True):
        engine.submit(one, held, answer.on_event)
    for answer in answers:
        answer.wait()
    took = max(answer.last for answer in answers) - began
    return sum(out for _, out in lengths) / took, [answer.first - answer.offered for answer in answers]


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


if __name__ == "__main__":
    main()
