"""What the device does in a step and between two, out of a profile of the running engine."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

BUSY = {"kernel", "gpu_memcpy", "gpu_memset"}
STEPS = 24
"""Steps that are profiled."""
UNSETTLED = 6
"""Profiled steps that are left out, the first ones, while the profiler begins."""


@dataclass(frozen=True)
class Work:
    """A kernel or copy on the device."""

    name: str
    begin: float
    """Microseconds, as its end."""
    end: float
    launch: int
    """A graph's launch is one for all of its kernels."""


@dataclass(frozen=True)
class Timeline:
    step_us: float
    """From one step's first kernel to the next one's, the median."""
    idle: float
    """Share of that with nothing on the device between one step's last kernel and the next one's first, in %."""
    idle_within: float
    """Share with nothing on the device inside of a step, in %."""
    before: float
    """Microseconds of a step before its first position, and after its last."""
    after: float
    positions: int
    kernels: Sequence[tuple[str, float]]
    """Of a position, in order: names and microseconds, each from the end of all before it to its own end. Kernels begin
    while those before them still run, so that their own durations say too much."""

    def print(self, title: str) -> None:
        print(
            f"{title}: a step {self.step_us / 1e3:.2f} ms in the profile, device idle {self.idle:.2f} % between steps "
            f"and {self.idle_within:.2f} % within; {self.before:.0f} us before the positions, {self.after:.0f} after"
        )
        for name, took in self.kernels:
            print(f"{took:10.2f} us  {name}")
        total = sum(took for _, took in self.kernels)
        print(f"{total:10.2f} us  a position of {self.positions}", flush=True)


def profiled(step: Callable[[], object]) -> Timeline:
    """Of a step that is called as often as it takes."""
    with profile(activities=[ProfilerActivity.CUDA]) as one:
        for _ in range(STEPS):
            step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        one.export_chrome_trace(str(file))
        return timeline(works(json.loads(file.read_text())["traceEvents"]))


def works(events: Sequence[dict[str, Any]]) -> list[Work]:
    """Out of the events of a Chrome trace."""
    found = [
        Work(event["name"], event["ts"], event["ts"] + event["dur"], event["args"]["correlation"])
        for event in events
        if event.get("cat") in BUSY
    ]
    return sorted(found, key=lambda work: (work.begin, work.end))


def timeline(found: Sequence[Work], unsettled: int = UNSETTLED) -> Timeline:
    launches: dict[int, list[Work]] = defaultdict(list)
    for work in found:
        launches[work.launch].append(work)
    most = max(map(len, launches.values()))
    # What else is launched between steps is single kernels and copies.
    steps = [launch for launch in launches.values() if len(launch) > most // 2]
    if most < 2:
        raise ValueError("no graph is in the profile")
    steps = sorted(steps, key=lambda step: step[0].begin)[unsettled:]
    if len(steps) < 3:
        raise ValueError(f"a profile of {len(steps)} steps says nothing")
    lengths, idles, within = [], [], []
    for step, following in pairwise(steps):
        begin, end, then = step[0].begin, max(work.end for work in step), following[0].begin
        lengths.append(then - begin)
        idles.append(idle(found, end, then) / (then - begin))
        within.append(idle(found, begin, end) / (then - begin))
    names = [work.name for work in steps[0]]
    first, period, positions = repeated(names)
    alike = [taken(step) for step in steps if [work.name for work in step] == names]
    mean = [statistics.fmean(column) for column in zip(*alike, strict=True)]
    last = first + period * positions
    return Timeline(
        step_us=statistics.median(lengths),
        idle=100 * statistics.fmean(idles),
        idle_within=100 * statistics.fmean(within),
        before=sum(mean[:first]),
        after=sum(mean[last:]),
        positions=positions,
        kernels=[(short(names[first + i]), statistics.fmean(mean[first + i : last : period])) for i in range(period)],
    )


def idle(found: Sequence[Work], begin: float, end: float) -> float:
    """Microseconds between two times with nothing on the device."""
    total, busy_until = 0.0, begin
    for work in found:
        if work.end > begin and work.begin < end:
            total += max(0.0, work.begin - busy_until)
            busy_until = max(busy_until, work.end)
    return total + max(0.0, end - busy_until)


def taken(step: Sequence[Work]) -> list[float]:
    """Microseconds of each work of a step, from the end of all before it."""
    latest, took = step[0].begin, []
    for work in step:
        took.append(max(0.0, work.end - latest))
        latest = max(latest, work.end)
    return took


def repeated(names: Sequence[str]) -> tuple[int, int, int]:
    """Where the positions of a step begin, how many kernels one has, and how many there are."""
    quarter = len(names) // 4
    middle = names[quarter : len(names) - quarter]
    period = next((p for p in range(1, len(middle)) if list(middle[p:]) == list(middle[:-p])), len(names))
    if period == len(names):
        return 0, period, 1
    first, last = quarter, len(names) - quarter
    while first > 0 and names[first - 1] == names[first - 1 + period]:
        first -= 1
    while last < len(names) and names[last] == names[last - period]:
        last += 1
    return first, period, (last - first) // period


def short(name: str) -> str:
    """A kernel's name without return type, arguments and what templates have."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].rpartition("::")[2][:60] or name[:60]
