"""The device's work within a step and between two steps, from a profile of the running engine."""

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
    """Begin in microseconds; `end` too is in microseconds."""
    end: float
    launch: int
    """Number of the launch; all kernels of a graph share one."""


@dataclass(frozen=True)
class Timeline:
    """Times of profiled steps, and of the kernels of a position."""

    step_us: float
    """Median microseconds from one step's first kernel to the next step's."""
    idle: float
    """Share of a step, in %, with nothing on the device between its last kernel and the next step's first."""
    idle_within: float
    """Share of a step, in %, with nothing on the device between its own kernels."""
    before: float
    """Microseconds of a step before its first position."""
    after: float
    """Microseconds of a step after its last position."""
    positions: int
    kernels: Sequence[tuple[str, float]]
    """Kernels of a position in order: name and microseconds, from the end of all earlier kernels to its own end.
    Kernels begin while earlier ones still run, so their own durations overlap."""

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
    """Calls `step` as many times as a profile needs, and returns its timeline."""
    with profile(activities=[ProfilerActivity.CUDA]) as one:
        for _ in range(STEPS):
            step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        one.export_chrome_trace(str(file))
        return timeline(works(json.loads(file.read_text())["traceEvents"]))


def works(events: Sequence[dict[str, Any]]) -> list[Work]:
    """Kernels and copies among the events of a Chrome trace, by begin."""
    found = [
        Work(event["name"], event["ts"], event["ts"] + event["dur"], event["args"]["correlation"])
        for event in events
        if event.get("cat") in BUSY
    ]
    return sorted(found, key=lambda work: (work.begin, work.end))


def timeline(found: Sequence[Work], unsettled: int = UNSETTLED) -> Timeline:
    """Finds the steps among the works, which are sorted by begin, and leaves out the first `unsettled`.

    Raises:
        ValueError: no graph is among the works, or fewer than three steps are left.
    """
    launches: dict[int, list[Work]] = defaultdict(list)
    for work in found:
        launches[work.launch].append(work)
    most = max(map(len, launches.values()))
    # All other launches between steps are single kernels and copies.
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
    """Index of the first position's first kernel, kernels of a position, and number of positions in a step."""
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
    """A kernel's name without return type, arguments and template arguments."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].rpartition("::")[2][:60] or name[:60]
