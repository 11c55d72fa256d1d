"""A fleet simulated from measured times: which pod a request goes to, and what that costs.

    python -m benchmarks.fleet.routing [--pods 1,4,16,64] [--adapters 10,100,1000,10000] [--seconds 60] [--plot FILE]

Requests arrive by a Poisson process, draw their adapters by Zipf's law, and ask for a fixed number of tokens. A pod
takes the times that were measured on one H100 (`benchmarks/log/`). Its steps take longer the more rows they have. It
holds 64 adapters, and loads another from local files on demand, while the least recently used one leaves. Each pod gets
the same share of its capacity, so a fleet without adapters would answer alike at any size.

`random` is a service without more knowledge. `affinity` is what an endpoint picker of the Gateway API Inference
Extension does with the adapters that a pod's metrics name: of the pods that have the adapter, it takes the one with the
fewest requests, unless all of them are full; else, of all pods, the one with the fewest. It knows every pod's state at
once, where the picker's is some tens of milliseconds old. Prefill is not simulated: its time would be added to both.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import simpy
from tqdm import tqdm

ROWS, STEP_SECONDS = (1, 8, 16, 32), (5.44e-3, 5.87e-3, 7.38e-3, 11.35e-3)
"""Seconds a step by rows, with a LoRA of rank 8 for each row, 64 positions and NF4."""
LOAD_SECONDS = 0.195
"""Seconds to load such an adapter from local files."""
ROOM = 64
"""Adapters that fit on a device."""
LOADS = 2
"""Concurrent loads. Two take as long as one here; that is an assumption, not measured."""
NEW_TOKENS = 128
LOAD = 0.6
"""Share of the tokens that full batches would make."""
WARM_UP = 1 / 3
"""Share of the time before anything is counted."""
ZIPF = 1.0


@dataclass(eq=False)
class Call:
    """A request for one adapter, and its arrival in seconds."""

    adapter: int
    arrived: float


class Pod:
    """Continuous batching over at most ROWS[-1] rows; a call waits until its adapter is there."""

    def __init__(self, environment: simpy.Environment, first_token: Callable[[Call], None]) -> None:
        self._environment, self._first_token = environment, first_token
        self.adapters: OrderedDict[int, simpy.Event] = OrderedDict()
        """Resident and loading adapters, the least recently used first."""
        self.loads = self.pending = 0
        self._loading = simpy.Resource(environment, LOADS)
        self._waiting: deque[Call] = deque()
        self._ends: list[int] = []
        """Heap of the step numbers after which running calls end."""
        self._work = environment.event()
        environment.process(self._run())

    @property
    def calls(self) -> int:
        return self.pending + len(self._waiting) + len(self._ends)

    def submit(self, call: Call) -> None:
        self._environment.process(self._admit(call))

    def _admit(self, call: Call) -> Generator[simpy.Event, Any, None]:
        if call.adapter not in self.adapters:
            self.adapters[call.adapter] = self._environment.process(self._load())
        self.adapters.move_to_end(call.adapter)
        loaded = self.adapters[call.adapter]
        if len(self.adapters) > ROOM:
            self.adapters.popitem(last=False)
        self.pending += 1
        yield loaded
        self.pending -= 1
        self._waiting.append(call)
        if not self._work.triggered:
            self._work.succeed()

    def _load(self) -> Generator[simpy.Event, Any, None]:
        self.loads += 1
        with self._loading.request() as place:
            yield place
            yield self._environment.timeout(LOAD_SECONDS)

    def _run(self) -> Generator[simpy.Event, Any, None]:
        steps = 0
        while True:
            if not self._ends and not self._waiting:
                self._work = self._environment.event()
                yield self._work
            new = []
            while self._waiting and len(self._ends) < ROWS[-1]:
                new.append(self._waiting.popleft())
                heapq.heappush(self._ends, steps + NEW_TOKENS)
            yield self._environment.timeout(float(np.interp(len(self._ends), ROWS, STEP_SECONDS)))
            steps += 1
            for call in new:
                self._first_token(call)
            while self._ends and self._ends[0] <= steps:
                heapq.heappop(self._ends)


def by_chance(pods: Sequence[Pod], adapter: int, generator: random.Random) -> Pod:
    return generator.choice(pods)


def by_affinity(pods: Sequence[Pod], adapter: int, generator: random.Random) -> Pod:
    warm = [pod for pod in pods if adapter in pod.adapters and pod.calls < ROWS[-1]]
    return min(warm or pods, key=lambda pod: (pod.calls, generator.random()))


ROUTINGS: Mapping[str, Callable[[Sequence[Pod], int, random.Random], Pod]] = {
    "random": by_chance,
    "affinity": by_affinity,
}


@dataclass(frozen=True)
class Outcome:
    """Result of one simulated fleet."""

    median: float
    """Median seconds to the first token."""
    p99: float
    """99th percentile of the seconds to the first token."""
    loads: float
    """Loads for each request."""


def simulate(pods: int, adapters: int, routing: str, seconds: float, progress: tqdm[Any]) -> Outcome:
    environment = simpy.Environment()
    # Two generators, so that every routing gets the same requests.
    requests, choices = random.Random(0), random.Random(1)
    times: list[float] = []
    begin = seconds * WARM_UP

    def first_token(call: Call) -> None:
        if call.arrived >= begin:
            times.append(environment.now - call.arrived)

    fleet = [Pod(environment, first_token) for _ in range(pods)]
    rate = pods * LOAD * ROWS[-1] / STEP_SECONDS[-1] / NEW_TOKENS
    weights = list(accumulate((rank + 1) ** -ZIPF for rank in range(adapters)))

    def arrivals() -> Generator[simpy.Event, Any, None]:
        while True:
            yield environment.timeout(requests.expovariate(rate))
            (adapter,) = requests.choices(range(adapters), cum_weights=weights)
            ROUTINGS[routing](fleet, adapter, choices).submit(Call(adapter, environment.now))

    environment.process(arrivals())
    environment.run(begin)
    before = sum(pod.loads for pod in fleet)
    environment.run(seconds)
    progress.update()
    median, p99 = np.quantile(times, (0.5, 0.99))
    return Outcome(float(median), float(p99), (sum(pod.loads for pod in fleet) - before) / len(times))


def main() -> None:
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--adapters", type=numbers, default=[10, 100, 1000, 10000])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--plot", type=Path, help="An SVG file.")
    options = parser.parse_args()
    cases = [(routing, pods) for routing in ROUTINGS for pods in options.pods]
    with tqdm(total=len(cases) * len(options.adapters), desc="simulated") as progress:
        outcomes = {
            case: [simulate(case[1], n, case[0], options.seconds, progress) for n in options.adapters] for case in cases
        }
    print("first token: median and 99th percentile in ms, loads a request")
    print(f"{'routing':10}{'pods':>5}" + "".join(f"{f'{n:,} adapters':>24}" for n in options.adapters))
    for (routing, pods), row in outcomes.items():
        cells = (f"{o.median * 1e3:9.0f}{o.p99 * 1e3:8.0f}{o.loads:7.2f}" for o in row)
        print(f"{routing:10}{pods:5}" + "".join(cells))
    if options.plot:
        plot(options.plot, options.adapters, outcomes)


def plot(file: Path, adapters: Sequence[int], outcomes: Mapping[tuple[str, int], Sequence[Outcome]]) -> None:
    plt.rcParams["svg.hashsalt"] = "routing"  # the same file for the same numbers
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = sorted({pods for _, pods in outcomes})
    colours = plt.colormaps["viridis"](np.linspace(0, 0.85, len(sizes)))
    for (routing, pods), row in outcomes.items():
        style = dict(color=colours[sizes.index(pods)], linestyle="-" if routing == "affinity" else "--", marker="o")
        left.plot(adapters, [o.p99 for o in row], label=f"{pods} pods, {routing}", **style)
        right.plot(adapters, [o.loads for o in row], **style)
    for axes, title in ((left, "first token, 99th percentile, s"), (right, "loads for each request")):
        axes.set(xscale="log", xlabel="adapters", title=title)
        axes.grid(alpha=0.3)
    left.set(yscale="log")
    left.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
