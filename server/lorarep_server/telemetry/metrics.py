"""Prometheus metrics: histograms of finished requests, and the engine's counts, which are read when they are scraped.

Names have the prefix `lorarep_`. The metrics of queue, KV memory and adapters mean what llm-d-router's protocol for
model servers says (its docs/plugin-metric-protocol.md), so that it can choose among servers. Residency and times of
loads have the names and labels that vLLM's pull request 54830 gives them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from grpc import StatusCode
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from lorarep_runtime.errors import LorarepError
from lorarep_runtime.integers import next_power_of_two
from lorarep_runtime.request import Finished
from lorarep_server.errors import code_of

if TYPE_CHECKING:
    from lorarep_runtime.adapters.revision import AdapterInfo
    from lorarep_runtime.engine.engine import Engine

T = TypeVar("T")

REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
PHASE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
LOAD_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)

LEVELS = {"device": "gpu", "host": "cpu"}
"""vLLM's names of tiers."""


_counted: ContextVar[list[str]] = ContextVar("counted")
"""What the current call's requests were counted as. All tasks of a call share the list."""


class Metrics:
    """The metrics that the server counts itself. Thread-safe."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: Iterable[float], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"lorarep_{name}", text, labels, buckets=tuple(buckets), registry=registry)

        self._request = histogram("request_seconds", "Submission to last token.", REQUEST_SECONDS)
        self._first = histogram("time_to_first_token_seconds", "Submission to first token.", PHASE_SECONDS)
        self._token = histogram("time_per_output_token_seconds", "One token to the next, on average.", TOKEN_SECONDS)
        self._queue = histogram("queue_seconds", "Submission to first step.", PHASE_SECONDS)
        self._prefill = histogram("prefill_seconds", "First step to first token.", PHASE_SECONDS)
        self._decode = histogram("decode_seconds", "First token to last.", REQUEST_SECONDS)
        self._load = histogram(
            "adapter_load_seconds", "Loads of adapters, checks included.", LOAD_SECONDS, ("source", "outcome")
        )
        self._transition = histogram(
            "lora_adapter_load_seconds",
            "Adapters that came to the device: from their files (load), or from host memory (activate).",
            PHASE_SECONDS,
            ("transition",),
        )
        self._ended = Counter(
            "lorarep_requests_finished", "Requests by what ended them.", ("reason",), registry=registry
        )

    def begin_call(self) -> None:
        """Says that the current task begins a call for answers. `refused` looks whether the call counts already."""
        _counted.set([])

    def refused(self, code: StatusCode) -> None:
        """Counts the current call as a request that ended with an error, unless a request of it was counted."""
        if not _counted.get([]):
            self.failed(code)

    def finished(self, finished: Finished) -> None:
        """Counts a request that has finished, and its timings."""
        times = finished.timings
        self._count(finished.reason.value)
        self._request.observe(times.total)
        self._first.observe(times.first_token)
        self._queue.observe(times.queued)
        self._prefill.observe(times.prefill)
        self._decode.observe(times.decode)
        if finished.completion_tokens > 1:
            self._token.observe(times.decode / (finished.completion_tokens - 1))

    def brought(self, tier: str, seconds: float) -> None:
        """Counts an adapter that has come to the device.

        Args:
            tier: where it came from, "disk" or "host".
        """
        self._transition.labels("activate" if tier == "host" else "load").observe(seconds)

    def failed(self, code: StatusCode) -> None:
        """Counts a request that ended with an error."""
        self._count(code.name.lower())

    def _count(self, reason: str) -> None:
        self._ended.labels(reason).inc()
        _counted.get([]).append(reason)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Cumulative buckets of the time to the first token and of the mean time per output token.

        Returns:
            For "first_token" and "output_token", the count of requests by the upper bound in seconds.
        """
        return {
            name: {
                sample.labels["le"]: sample.value
                for family in histogram.collect()
                for sample in family.samples
                if sample.name.endswith("_bucket")
            }
            for name, histogram in (("first_token", self._first), ("output_token", self._token))
        }

    def timed_load(self, source: str, load: Callable[[], T]) -> Callable[[], T]:
        """Wraps a load so that its duration and outcome are counted.

        Args:
            source: "hub" or "folder".
        """

        def timed() -> T:
            started, outcome = time.monotonic(), "ok"
            try:
                return load()
            except BaseException as error:  # libraries in Rust panic with what is no Exception
                outcome = code_of(error).name.lower()
                raise
            finally:
                self._load.labels(source, outcome).observe(time.monotonic() - started)

        return timed


class EngineCollector(Collector):
    """Exports a snapshot of the engine as metrics; nothing until the engine is loaded."""

    def __init__(self, engine: Callable[[], Engine], entry_states: Callable[[], Mapping[str, int]]) -> None:
        """
        Args:
            engine: gives the engine, or raises until it is loaded.
            entry_states: gives the number of the adapters file's entries in each state.
        """
        self._engine = engine
        self._entry_states = entry_states

    def collect(self) -> Iterable[Metric]:
        try:
            engine = self._engine()
        except LorarepError:
            return
        stats, ledger = engine.stats(), engine.ledger()
        yield _gauge("requests_running", "Requests in steps.", stats.running)
        yield _gauge("requests_waiting", "Requests in the queue.", stats.waiting)
        yield _counter("preemptions", "Requests that gave their pages back for older ones.", stats.preemptions)
        yield _counter("prompt_tokens", "Tokens of prompts, cached ones included.", stats.tokens_in)
        yield _counter("completion_tokens", "Tokens that were generated.", stats.tokens_out)
        queries, hits = stats.prefix_queries, stats.prefix_hits
        yield _counter("prefix_cache_queries", "Tokens of prompts that were looked for in the prefix cache.", queries)
        yield _counter("prefix_cache_hits", "Those of them that were there, and were not computed again.", hits)
        most = engine.max_sequences
        yield _counts("step_rows", "Requests in a step.", stats.step_rows, most)
        yield _counts("step_adapters", "Distinct adapters in a step.", stats.step_adapters, most)
        yield _gauge("kv_pages", "Pages of KV memory.", stats.pages_total)
        yield _gauge("kv_pages_used", "Pages of KV memory that requests have.", stats.pages_used)
        yield _gauge("kv_usage_ratio", "Part of the pages in use, 0 to 1.", stats.pages_used / stats.pages_total)
        yield _by("memory_bytes", "Device memory.", "category", ledger.categories)
        yield _by("adapter_memory_bytes", "Device memory of adapters and of mixes.", "adapter", ledger.adapters)
        ranks = {str(rank): sum(held.values()) for rank, held in enumerate(ledger.ranks or [ledger.categories])}
        yield _by("rank_memory_bytes", "Device memory of each rank of the base.", "rank", ranks)
        tiers = engine.adapters.tiers()
        by_tier = {tier: tiers.get(tier, 0) for tier in ("device", "host", "disk")}
        yield _by("adapters_loaded", "Adapters that can be named, by where they are.", "tier", by_tier)
        yield _by("adapters_desired", "Entries of the adapters file.", "state", self._entry_states())
        evictions = engine.adapters.residency.evictions
        yield _counter("adapter_evictions", "Adapters that left device memory for others.", evictions)
        host_bytes = engine.adapters.residency.host_bytes
        yield _gauge("adapter_host_bytes", "Host memory of copies of adapters.", host_bytes)
        yield _residency(engine.adapters.in_memory())
        room = _most_adapters(engine.adapter_bytes, ledger.adapters)
        yield _lora_requests_info(room, stats.running_adapters, stats.waiting_adapters)


def _most_adapters(room: int, held: Mapping[str, int]) -> int:
    """The number of adapters that device memory has room for, if they are as large as those that are there.

    Args:
        room: bytes for adapters.
        held: bytes of each adapter on the device, by its name; labels of several are in brackets.
    """
    sizes = [size for name, size in held.items() if not name.startswith("(")]
    return max(1, room * len(sizes) // sum(sizes)) if sizes else 1


def _lora_requests_info(most: int, running: Iterable[str], waiting: Iterable[str]) -> Metric:
    """One sample, whose labels have the adapters' names as requests have them."""
    info = GaugeMetricFamily(
        "lorarep_lora_requests_info",
        "Adapters of running and waiting requests; the value is the time of this snapshot.",
        labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    )
    info.add_metric((str(most), ",".join(running), ",".join(waiting)), time.time())
    return info


def _residency(adapters: Iterable[AdapterInfo]) -> Metric:
    """A sample for each adapter in memory. Mixes have none: callers choose their weights."""
    family = GaugeMetricFamily(
        "lorarep_lora_adapter_loaded",
        "1 for each adapter in memory: on the device (gpu, also where that is a CPU), or in host memory alone (cpu).",
        labels=("adapter_name", "level", "pinned", "rank"),
    )
    for adapter in adapters:
        if level := LEVELS.get(adapter.tier):
            family.add_metric((adapter.name, level, str(adapter.pinned).lower(), str(adapter.rank)), 1)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lorarep_{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"lorarep_{name}", text, value)


def _by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"lorarep_{name}", text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _counts(name: str, text: str, steps: Mapping[int, int], most: int) -> Metric:
    """A histogram of steps by size, with a bucket for each power of two up to `most`.

    Args:
        steps: the number of steps, by their size.
    """
    bounds = [0, *(1 << power for power in range(next_power_of_two(most).bit_length()))]
    buckets = [
        (floatToGoString(bound), float(sum(n for size, n in steps.items() if size <= bound))) for bound in bounds
    ]
    buckets.append(("+Inf", float(sum(steps.values()))))
    total = float(sum(size * n for size, n in steps.items()))
    return HistogramMetricFamily(f"lorarep_{name}", text, buckets=buckets, sum_value=total)
