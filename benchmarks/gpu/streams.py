"""Requests that stream through a running engine, and how much other work slows them down."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.gpu.decode import request
from lorarep_runtime.engine.engine import Engine
from lorarep_runtime.request import Event, Output

SHORT = 128
STEADY = 40
"""First and last tokens of each stream that are not timed."""


class Stream:
    """One request and when each of its tokens came."""

    def __init__(
        self, engine: Engine, adapter: str, prompt_tokens: int, new_tokens: int, temperature: float = 0
    ) -> None:
        self.times: list[float] = []
        self.ended = threading.Event()
        self._failure: Event | None = None
        self.began = time.perf_counter()
        generator = random.Random(prompt_tokens)
        prompt = tuple(generator.randrange(256) for _ in range(prompt_tokens))
        lease = engine.adapters.lease([(adapter, 1.0)])
        engine.submit(request(prompt, new_tokens, temperature), lease, self._on_event)

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
def running(engine: Engine, adapters: Sequence[str], new_tokens: int, temperature: float = 0) -> Iterator[list[Stream]]:
    """Streams that all decode. Leaving the context waits for their ends."""
    streams = [Stream(engine, name, SHORT, new_tokens, temperature) for name in adapters]
    while min(len(stream.times) for stream in streams) < STEADY:
        time.sleep(0.001)
    yield streams
    for stream in streams:
        stream.wait()


@dataclass(frozen=True)
class Slowdown:
    """Gaps between the tokens of streams, before and during other work, in seconds."""

    before: float
    """Mean gap before the work."""
    meanwhile: float
    """Mean gap during the work."""
    median: float
    """Median gap before the work."""
    longest_before: float
    """Longest gap before the work, which the machine alone causes."""
    longest: float
    """Longest gap during the work."""

    def __str__(self) -> str:
        return (
            f"a token {self.before * 1e3:.2f} ms before, {self.meanwhile * 1e3:.2f} meanwhile, "
            f"{self.slower:.2f} times; longest gap {self.longest_before * 1e3:.1f} ms before, "
            f"{self.longest * 1e3:.1f} meanwhile, {self.longest_gap:.2f} times the median"
        )

    @property
    def slower(self) -> float:
        return self.meanwhile / self.before

    @property
    def longest_gap(self) -> float:
        return self.longest / self.median


def measure_slowdown(
    engine: Engine, adapters: Sequence[str], new_tokens: int, temperature: float, work: Callable[[], object]
) -> Slowdown:
    """Runs `work` while streams decode, and measures their gaps before and meanwhile."""
    with running(engine, adapters, new_tokens, temperature) as streams:
        calm = time.perf_counter()
        time.sleep(1)
        begin = time.perf_counter()
        work()
        for stream, had in [(stream, len(stream.times)) for stream in streams]:  # the gap in which it ended counts
            while len(stream.times) == had:
                if stream.ended.is_set():
                    raise SystemExit("a stream ended too early: more --new-tokens")
                time.sleep(0.001)
        end = time.perf_counter()
    usual = [gap for stream in streams for gap in stream.gaps(calm, begin)]
    during = [gap for stream in streams for gap in stream.gaps(begin, end)]
    return Slowdown(
        statistics.fmean(usual), statistics.fmean(during), statistics.median(usual), max(usual), max(during)
    )
