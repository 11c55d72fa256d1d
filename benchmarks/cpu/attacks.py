"""Each attack on a server process of one tree of sources or two, and what innocent callers see of it.

    python -m benchmarks.cpu.attacks [--tree .] [--before TREE] [--only A1,B3]
        [--write benchmarks/results/cpu_attacks.json]

An attack has a server of its own, unless it only asks for what was answered wrongly. Beside it, callers in another
process compare their answers with those before the attack. Calls of an attack end after 20 seconds, and what has not
come back within so many seconds more is not waited for. `--write` puts the figures into a file of results; without
`--before` that file keeps its earlier ones. A tree is a checkout, such as one that `git worktree add` makes.

Ends with status 1 if `--tree` keeps a promise no more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

# The servers inherit these.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")

import psutil
from tqdm import tqdm

from benchmarks.cpu.hostile import ATTACKS
from benchmarks.cpu.hostile.attack import Attack, Outcome, Target
from benchmarks.cpu.innocents import OTHER_TOKENS, Innocents
from tests.support.servers import Server, serving
from tests.support.world import World, published

SECONDS = 20.0
"""Longest time of one call of an attack, and longest wait for the innocents' next answers after it."""
END_SECONDS = 10
"""Longest wait for the end of a server after SIGTERM. Its grace time is one second."""
DESCRIPTORS = 1024
"""Soft limit of a server's open files, as systemd and containerd set it."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Figures:
    """What one attack did to one server."""

    outcome: str
    kept: bool
    """Whether every promise was kept."""
    gap: str | int
    """Longest gap of the innocent streams, in ms."""
    wait: str | int
    """Longest wait of the newcomer, in ms."""
    memory: int
    """Peak of resident memory over that before the attack, in MiB."""

    def columns(self, when: str) -> dict[str, Any]:
        """As fields of a row."""
        return {when: self.outcome, **{f"{when}_{name}": getattr(self, name) for name in ("gap", "wait", "memory")}}


class Memory:
    """The resident memory of a process and its children, while the context lasts."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._most = 0
        self._sampler = threading.Thread(target=self._sample)

    def __enter__(self) -> Memory:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")  # the peak begins anew
        self._before = self._now()
        self._sampler.start()
        return self

    def _now(self) -> int:
        own = self._process.cmdline()
        total = self._process.memory_info().rss
        for child in self._process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                # A child that has yet to execute its own program shows the memory of its parent.
                total += child.memory_info().rss if child.cmdline() not in ([], own) else 0
        return total

    def _sample(self) -> None:
        with suppress(psutil.NoSuchProcess):  # the attack has ended it
            while not self._over.wait(0.1):
                self._most = max(self._most, self._now())

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._sampler.join()
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        # A process that has ended has no peak any more.
        peaks = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")]
        self.peak = (max([self._most, *peaks]) - self._before) >> 20
        """Most memory over that at the beginning, in MiB."""


@contextmanager
def running(tree: Path, world: World, attacks: Sequence[Attack]) -> Iterator[Target]:
    """A server of a tree, which has been told to end when the context ends."""
    script = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]["lorarep"]
    module, _, function = script.partition(":")
    path = os.pathsep.join(str(tree / folder) for folder in (".", "server", "proto"))
    cache = world.cache / tree.name
    shared = [*world.flags(), f"--cache-dir={cache}", "--kv-bytes=16MiB", "--allow-repository=org/*"]
    shared += ["--adapter=dora=org/dora", "--openai-listen=127.0.0.1:0", "--grace-seconds=1"]
    env = {**world.failpoints.env, **world.env, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    if not any(attack.failpoints for attack in attacks):
        del env["LORAREP_FAILPOINTS"]
    command = (sys.executable, "-c", f"from {module} import {function}; {function}()")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
    try:
        with serving([*shared, *attacks[0].flags], env, command=command) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            yield Target(world, server.wait_ready(), cache, SECONDS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def ends_in_time(server: Server) -> bool:
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def measure(attack: Attack, target: Target, innocents: Innocents) -> Figures:
    """Attacks once."""
    innocents.begin()
    with Memory(target.server.process.pid) as memory:
        try:
            outcome = attack.strike(target)
        except psutil.NoSuchProcess:
            outcome = Outcome("", False)
        seen = innocents.end(SECONDS)
    if (status := target.server.process.poll()) is not None:
        outcome = Outcome(f"the server ended with status {status}", False)
    said = [*filter(None, [outcome.said]), *sorted(set(seen.wrong))]
    is_wrong = any(attack.exact or what != OTHER_TOKENS for what in seen.wrong)
    is_kept = outcome.kept and seen.recovered and not is_wrong
    gap, wait = milliseconds(seen.gap, seen.gap_lasts), milliseconds(seen.wait, seen.wait_lasts)
    return Figures("; ".join(said), is_kept, gap, wait, memory.peak)


def milliseconds(seconds: float, lasts: bool) -> str | int:
    """A time in ms; as text where it had not ended."""
    return f"> {1000 * seconds:,.0f}" if lasts else round(1000 * seconds)


def run(tree: Path, world: World, attacks: Sequence[Attack]) -> Iterator[Figures]:
    """The figures of attacks that share a server."""
    with running(tree, world, attacks) as target, Innocents(target.server.address) as innocents:
        for i, attack in enumerate(attacks):
            attack.prepare(target)
            figures = measure(attack, target, innocents)
            if i == len(attacks) - 1 and not ends_in_time(target.server):
                said = f"{figures.outcome}; runs on {END_SECONDS} s after SIGTERM"
                figures = Figures(said, False, figures.gap, figures.wait, figures.memory)
            yield figures


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Puts rows into a file of results. Rows and figures that are not new stay, but those of attacks that are gone."""
    table = json.loads(file.read_text())
    earlier = {(row["fault"], row["attack"]): row for row in table["rows"]}
    for row in rows:
        key = (row["fault"], row["attack"])
        earlier[key] = {**earlier.get(key, {}), **row}
    table["rows"] = [earlier[key] for attack in ATTACKS if (key := (attack.fault, attack.title)) in earlier]
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in table.pop("rows"))
    head = json.dumps(table, indent=1, ensure_ascii=False).removesuffix("\n}")
    file.write_text(head + ',\n "rows": [\n  ' + lines + "\n ]\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="its figures are those after")
    parser.add_argument("--before", type=Path, help="another tree, whose figures are those before")
    parser.add_argument("--only", type=lambda names: names.split(","), help="names of faults, such as A1,B3")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a file of results")
    options = parser.parse_args()
    chosen = [attack for attack in ATTACKS if options.only is None or attack.fault in options.only]
    trees = {"before": options.before, "after": options.tree}
    rows: dict[str, dict[str, Any]] = {
        attack.title: {"fault": attack.fault, "attack": attack.title} for attack in chosen
    }
    lost = []
    with tempfile.TemporaryDirectory() as name, published(Path(name)) as world:
        folder = Path(name, "hostile")
        folder.mkdir()
        for i, attack in enumerate(chosen):
            (folder / str(i)).mkdir()
            attack.publish(world, folder / str(i))
        groups = [[attack] for attack in chosen if attack.alone]
        groups += [list(group) for _, group in groupby((a for a in chosen if not a.alone), key=lambda a: a.flags)]
        with tqdm(total=len(chosen) * sum(tree is not None for tree in trees.values())) as bar:
            for group in groups:
                for when, tree in trees.items():
                    if tree is None:
                        continue
                    for attack, figures in zip(group, run(tree.resolve(), world, group), strict=True):
                        rows[attack.title] |= figures.columns(when)
                        bar.write(f"{attack.fault} {when}: {figures}")
                        bar.update()
                        if when == "after" and not figures.kept:
                            lost.append(attack.fault)
                if options.write is not None:
                    write(options.write, [rows[attack.title] for attack in group])
    if lost:
        raise SystemExit(f"not kept: {', '.join(lost)}")


if __name__ == "__main__":
    main()
