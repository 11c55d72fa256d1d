"""Half an hour of everything at once against one server process on the CPU, and what it leaves behind.

    python -m benchmarks.cpu.soak [--minutes 30]

Callers ask the base, its stacks, adapters and mixes of them for greedy and seeded answers; some cancel, some have no
time, some vanish. Others ask for several answers, log-probabilities of prompts, forms and calls of tools over OpenAI's
API. Adapters come and go, the Hub stalls, cuts, lies and limits, steps fail and hang, memory is short.
Hostile callers among them attack at random times as `benchmarks.cpu.attacks` does, and get nothing but refusals.
Every answer is compared with what its request gives alone; one that breaks off, with the beginning of that. Ends with
status 1 if one differs, a call ends as none should, health is not steady, or anything is left: a page, a reference, a
file, memory.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The server inherits these. oneDNN keeps a kernel for each of the last thousand shapes, which would look like growth.
os.environ.update(OMP_NUM_THREADS="1", LRU_CACHE_CAPACITY="128", ONEDNN_PRIMITIVE_CACHE_CAPACITY="128")
os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", HF_HUB_DISABLE_TELEMETRY="1")

import grpc
import psutil
from lorarep.v1 import generation_pb2 as pb
from lorarep.v1 import generation_pb2_grpc
from tqdm import tqdm

from benchmarks.cpu import soak_requests
from benchmarks.cpu.hostile import ATTACKS
from benchmarks.cpu.hostile.attack import Target
from tests.faults.conftest import held
from tests.support.callers import SERVING, health, load, request, stream, unload
from tests.support.failpoints import Failpoints
from tests.support.hub_faults import FaultyHub
from tests.support.models import save_adapter
from tests.support.servers import Server, serving, wait_for
from tests.support.world import ADAPTERS, HERMES, World, published

KINDS = 80
"""Distinct requests."""
CALLERS = 8
BODIES = 30
"""Distinct requests over OpenAI's API."""
ASKERS = 3
COMING = 12
"""Repositories whose adapters come and go."""
PIPES = 2
"""Descriptors by which a server speaks to a process of its own."""
SAMPLE_SECONDS = 5.0
GROWTH = 1.05
"""Most growth of resident memory, from the median of the second quarter to the median of the last.

In the first, large messages of attackers fill the allocator's heaps, which then stay.
"""

MEANT = {
    "call": {"CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL: the forward pass failed"},
    "load": {"UNAVAILABLE", "DATA_LOSS", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION: nothing is downloaded"},
    "attack": {
        *("INVALID_ARGUMENT", "FAILED_PRECONDITION", "DATA_LOSS"),
        *("CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"),
    },
}
"""Statuses other than OK with which calls and loads may end, and attacks instead of what is promised alone.

Some with the end of their details: a Hub that lies about a size is refused for it.
"""
LEAVE_NOTHING = ("A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A10", "B1", "B3", "B4")
"""Faults whose attacks any server bears again and again, and that leave nothing behind."""
HOSTILE = [attack for attack in ATTACKS if attack.fault in LEAVE_NOTHING]
ATTACKERS = 2
ATTACK_PAUSE_SECONDS = 8.0
"""Longest pause of an attacker."""
ATTACK_SECONDS = 20.0
"""Longest time of one call of an attack."""
HEALTH_SECONDS = 1.0
"""Seconds between two looks at the server's health."""


class Soak:
    def __init__(self, world: World, server: Server, failpoints: Failpoints) -> None:
        self.world, self.server, self.failpoints = world, server, failpoints
        self.counts: Counter[str] = Counter()
        self.bad: list[str] = []
        self.slowest_health = 0.0
        """Longest time until health was answered, in seconds."""
        self.over = threading.Event()
        dice = random.Random(0)
        self.kinds = [soak_requests.kind(dice) for _ in range(KINDS)]
        self.alone = [tokens_of(server.generation.Generate(wanted)) for wanted in self.kinds]
        self.bodies = soak_requests.bodies(dice, BODIES, "caller")
        self.bodies_alone = [soak_requests.answer_to(server, *body) for body in self.bodies]
        for body, (status, told) in zip(self.bodies, self.bodies_alone, strict=True):
            if status != 200:
                self.fail(f"{status} {told}: {body}")
        self.coming = {name: self._tokens_of_coming(name) for name in coming_names()}
        self.target = Target(world, server, world.cache, ATTACK_SECONDS)
        for attack in HOSTILE:
            attack.prepare(self.target)

    def _tokens_of_coming(self, repository: str) -> list[int]:
        load(self.server, "coming", repository)
        tokens = tokens_of(self.server.generation.Generate(request("coming", "coming", new_tokens=8)))
        unload(self.server, "coming")
        return tokens

    def fail(self, what: str) -> None:
        """Remembers and tells what is wrong or unmeant."""
        self.bad.append(what)
        tqdm.write(what)

    def call(self, dice: random.Random) -> None:
        """Sends one request, and reads it, cancels it, lets it time out, or vanishes."""
        number = dice.randrange(KINDS)
        wanted, alone = self.kinds[number], self.alone[number]
        match dice.choices(["whole", "streamed", "cancelled", "short of time", "vanished"], [4, 4, 1, 1, 1])[0]:
            case "whole":
                with self.counted("call", "answers"):
                    self.compare(tokens_of(self.server.generation.Generate(wanted)), alone, wanted)
            case "streamed":
                with self.counted("call", "answers"):
                    self.compare(self.read(stream(self.server, wanted), alone, wanted), alone, wanted)
            case "cancelled":
                with self.counted("call", "answers before they were cancelled"):
                    call = stream(self.server, wanted)
                    self.read(call, alone, wanted, leave=dice.randrange(8), by=call.cancel)
            case "short of time":
                with self.counted("call", "answers in little time"):
                    call = stream(self.server, wanted, timeout=dice.choice([0.005, 0.05, 0.3]))
                    self.read(call, alone, wanted)
            case "vanished":
                with self.counted("call", "answers to who vanished"):
                    channel = grpc.insecure_channel(self.server.address, [("grpc.use_local_subchannel_pool", 1)])
                    call = stream(self.server, wanted, stub=generation_pb2_grpc.GenerationServiceStub(channel))
                    self.read(call, alone, wanted, leave=dice.randrange(8), by=channel.close)

    def read(
        self,
        call: Any,
        alone: list[int],
        wanted: pb.GenerateRequest,
        *,
        leave: int | None = None,
        by: Callable[[], object] = lambda: None,
    ) -> list[int]:
        """Reads a stream, whose tokens have to begin like the answer alone, wherever the stream ends."""
        tokens: list[int] = []
        try:
            for i, message in enumerate(call):
                tokens += message.chunk.token_ids
                if i == leave:
                    by()
        finally:
            by()
            self.compare(tokens, alone[: len(tokens)], wanted)
        return tokens

    def compare(self, tokens: list[int], alone: list[int], wanted: object) -> None:
        if tokens != alone:
            self.fail(f"{tokens} in place of {alone}: {wanted}")

    def ask(self, dice: random.Random) -> None:
        """Sends one request over OpenAI's API."""
        number = dice.randrange(BODIES)
        status, told = soak_requests.answer_to(self.server, *self.bodies[number])
        alone = self.bodies_alone[number][1]
        if status == 200:
            self.counts["answers over OpenAI's API"] += 1
            if not soak_requests.are_same(told, alone):
                self.fail(f"{told} in place of {alone}: {self.bodies[number]}")
        elif status == 429 or (status == 500 and told.endswith("the forward pass failed")):
            self.counts[f"calls over OpenAI's API ended {status}"] += 1
        else:
            self.fail(f"{status} {told}: {self.bodies[number]}")

    def come_and_go(self, dice: random.Random, name: str) -> None:
        """Loads one adapter from the Hub or its cache, uses it and unloads it."""
        repository = dice.choice([r for r in self.coming if r.endswith(name)])
        if dice.random() < 0.7:
            shutil.rmtree(self.world.cache / f"models--{repository.replace('/', '--')}", ignore_errors=True)
        with self.counted("load", "loads"):
            load(self.server, name, repository)
            try:
                with self.counted("call", "answers of what had come"):
                    answer = self.server.generation.Generate(request("coming", name, new_tokens=8))
                    self.compare(tokens_of(answer), self.coming[repository], repository)
            finally:
                unload(self.server, name)
            return
        self.over.wait(0.2)

    def break_hub(self, dice: random.Random) -> None:
        hub, weights = self.world.hub, "adapter_model.safetensors"
        fault = dice.choice(["stalls", "hangs in a body", "cuts", "limits the rate", "is broken", "lies", "garbles"])
        self.counts[f"the Hub {fault}"] += 1
        match fault:
            case "stalls":
                hub.stalled = True
            case "hangs in a body":
                hub.hangs[weights] = 100
            case "cuts":
                hub.cuts[weights] = [100] * dice.randrange(1, 20)
            case "limits the rate":
                hub.status = 429
            case "is broken":
                hub.status = 503
            case "lies":
                hub.claims[weights] = dice.choice([1000, 1 << 40])
            case "garbles":
                hub.garbage = b"<html>"
        self.over.wait(dice.uniform(0.5, 3))
        mend(hub)
        self.over.wait(dice.uniform(0.5, 3))

    def break_server(self, dice: random.Random) -> None:
        name, action = dice.choice(
            [
                ("forward", "once error"),
                ("step", "once sleep 0.3"),
                ("adapter", "once out-of-memory"),
                ("adapter", "once sleep 0.5"),
            ]
        )
        self.counts[f"failpoint {name}: {action}"] += 1
        self.failpoints.set(name, action)
        self.over.wait(dice.uniform(1, 4))

    def attack(self, dice: random.Random) -> None:
        attack = dice.choice(HOSTILE)
        outcome = attack.strike(self.target)
        self.counts[f"attack {attack.fault}: {attack.title}"] += 1
        statuses = set(re.findall("[A-Z_]{2,}", outcome.said))
        # The other faults hurt attackers, too.
        if not outcome.kept and not (statuses and statuses <= MEANT["attack"]):
            self.fail(f"{attack.fault}: {outcome.said}")
        self.over.wait(dice.uniform(0, ATTACK_PAUSE_SECONDS))

    def watch_health(self, dice: random.Random) -> None:
        for service in ("", "liveness", "readiness"):
            began = time.monotonic()
            if health(self.server, service) != SERVING:
                self.fail(f"health of {service!r} is not SERVING")
            self.slowest_health = max(self.slowest_health, time.monotonic() - began)
        self.over.wait(HEALTH_SECONDS)

    @contextmanager
    def counted(self, what: str, done: str) -> Iterator[None]:
        """Counts how a call ends; some calls are meant to fail."""
        try:
            yield
        except grpc.RpcError as error:
            code, told = error.code().name, error.details() or ""
            ends = [
                end for end in MEANT[what] if code == end.partition(": ")[0] and told.endswith(end.partition(": ")[2])
            ]
            if ends:
                self.counts[f"{what}s ended {ends[0]}"] += 1
            else:
                self.fail(f"{what}: {code} {told}")
        else:
            self.counts[done] += 1

    def keep(self, work: Callable[[random.Random], None], seed: int) -> None:
        dice = random.Random(seed)
        while not self.over.is_set() and len(self.bad) < 20:
            try:
                work(dice)
            except Exception as error:
                self.fail(repr(error))

    def run(self, seconds: float) -> list[int]:
        """Runs all work concurrently.

        Returns:
            The server's resident memory every few seconds, in bytes.
        """
        works = [self.call] * CALLERS + [self.ask] * ASKERS + [self.break_hub, self.break_server]
        works += [lambda dice, name=name: self.come_and_go(dice, name) for name in ("a", "b")]
        works += [self.attack] * ATTACKERS + [self.watch_health]
        threads = [threading.Thread(target=self.keep, args=(work, i)) for i, work in enumerate(works)]
        for thread in threads:
            thread.start()
        process, memory, began = psutil.Process(self.server.process.pid), [], time.monotonic()
        with tqdm(total=round(seconds), unit="s") as bar:
            while (passed := time.monotonic() - began) < seconds and len(self.bad) < 20:
                time.sleep(SAMPLE_SECONDS)
                memory.append(process.memory_info().rss)
                bar.set_postfix(
                    answers=self.counts["answers"], loads=self.counts["loads"], bad=len(self.bad), MiB=memory[-1] >> 20
                )
                bar.update(round(passed) - bar.n)
        self.over.set()
        for thread in threads:
            thread.join()
        mend(self.world.hub)
        self.failpoints.clear()
        return memory


def mend(hub: FaultyHub) -> None:
    hub.stalled, hub.status, hub.garbage = False, None, None
    for faults in (hub.cuts, hub.hangs, hub.claims):
        faults.clear()


def tokens_of(answer: pb.GenerateResponse) -> list[int]:
    return list(answer.token_ids)


def coming_names() -> list[str]:
    return [f"org/coming-{i}-{'ab'[i % 2]}" for i in range(COMING)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for the attackers' connections
    with tempfile.TemporaryDirectory() as name, published(Path(name)) as world:
        folder = Path(name)
        configs = list(ADAPTERS.values())
        world.hub.publish("org/other", save_adapter(world.base, folder / "other", seed=9, **configs[0]))
        caller = Path(shutil.copytree(world.adapters["plain"], folder / "caller"))
        (caller / "chat_template.jinja").write_text(HERMES)
        world.hub.publish("org/caller", caller)
        for i, repository in enumerate(coming_names()):
            made = save_adapter(world.base, folder / f"coming-{i}", seed=20 + i, **configs[i % len(configs)])
            world.hub.publish(repository, made)
        for i, attack in enumerate(HOSTILE):
            (folder / "hostile" / str(i)).mkdir(parents=True)
            attack.publish(world, folder / "hostile" / str(i))
        failpoints = Failpoints(folder / "failpoints")
        flags = [*world.flags(), "--kv-bytes=512KiB", "--stack=deep=0-4,2-6", "--allow-repository=org/*"]
        flags += ["--openai-listen=127.0.0.1:0"]
        flags += [f"--adapter={name}=org/{name}" for name in ("lora", "dora", "other", "caller")]
        with serving(flags, {**world.env, **failpoints.env}) as server:
            server.wait_ready()
            report(Soak(world, server, failpoints), 60 * options.minutes)


def report(soak: Soak, seconds: float) -> None:
    before = held(soak.server)
    memory = soak.run(seconds)
    after: dict[str, Any] = {}

    def clean() -> bool:
        after.update(held(soak.server))
        # Fewer descriptors are no leak: a connection to the Hub may have closed. Processes that render templates stay.
        most = before["descriptors"] + PIPES * len(psutil.Process(soak.server.process.pid).children())
        return {**after, "descriptors": 0} == {**before, "descriptors": 0} and after["descriptors"] <= most

    try:
        wait_for(clean, "everything to be back", 60)
    except AssertionError:
        soak.fail(f"held before: {before}, after: {after}")
    quarter = max(1, len(memory) // 4)
    second, last = (statistics.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    if last > GROWTH * second:
        soak.fail("resident memory has grown")
    rows = [*sorted(soak.counts.items()), ("wrong or unmeant", len(soak.bad))]
    rows += [("health, slowest answer, ms", round(1000 * soak.slowest_health))]
    rows += [
        (f"resident MiB, {when} quarter", round(size / 2**20)) for when, size in (("second", second), ("last", last))
    ]
    for title, count in rows:
        print(f"{title:100}{count:10,}")
    if soak.bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
