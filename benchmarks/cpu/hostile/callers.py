"""Attacks by what callers send: lists, bodies, connections, numbers of requests, and leaving early."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import psutil
from lorarep.v1 import generation_pb2 as pb
from lorarep.v1 import generation_pb2_grpc

from benchmarks.cpu.hostile.attack import Attack, Outcome, Target, code, codes, counted, post, publish_adapter, refused
from tests.support.callers import load, request, stream
from tests.support.world import ADAPTERS

GENERATE = "/lorarep.v1.GenerationService/Generate"
STOP_TOKENS = 15_900_000
"""As many as fit into a message of gRPC, of one byte each."""
LONG_CALLS, LONG_BYTES, LEAVE_SECONDS = 12, 4 << 20, 0.25
HALF = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
HALF_BODY = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 15000000\r\n\r\n"
)
METRICS_CONNECTIONS, OPENAI_CONNECTIONS, BODIES, BODY_BYTES = 300, 800, 20, 8 << 20
HELD_SECONDS = 4.0
WAITING_CALLS = 600
NAMES, SCRAPERS, SCRAPE_SECONDS = 10_000, 4, 5.0
DEEP_STACKS, DEEP_POSITIONS = 8, 512


def strike_stop_tokens(target: Target) -> Outcome:
    stopping = pb.Stopping(max_new_tokens=20, ignore_eos=True, stop_token_ids=[3] * STOP_TOKENS)
    data = request("abc", stopping=stopping).SerializeToString()
    generate = target.server.channel.unary_unary(GENERATE)  # type: ignore[call-arg]
    return refused("INVALID_ARGUMENT")(codes([partial(generate, data, timeout=target.seconds)] * 2, 2))


def strike_bodies(target: Target) -> Outcome:
    bodies = {
        "/v1/completions": b'{"model":"base","prompt":[' + b"5," * 7_500_000 + b"5]}",
        "/v1/chat/completions": b'{"model":"dora","messages":['
        + b'{"role":"user","content":""},' * 500_000
        + b'{"role":"user","content":""}]}',
    }
    statuses = [post(target, path, body)[0] for path, body in bodies.items()]
    said = ", ".join({-1: "closed", 0: "no answer"}.get(status, str(status)) for status in statuses)
    return Outcome(said, all(status == -1 or 400 <= status < 500 for status in statuses))


def strike_leaving(target: Target) -> Outcome:
    dice = random.Random(0)
    word = "".join(dice.choice("abcdefgh ") for _ in range(1 << 16))
    wanted = request(word * (LONG_BYTES >> 16))
    calls = [lambda: target.server.generation.Generate(wanted, timeout=LEAVE_SECONDS)] * LONG_CALLS
    return refused("INVALID_ARGUMENT")(codes(calls, 1))


def strike_connections(target: Target) -> Outcome:
    """Half requests at both HTTP ports, and half bodies at OpenAI's."""
    process = psutil.Process(target.server.process.pid)
    threads = process.num_threads()
    metrics = urllib.parse.urlsplit(target.server.metrics_url).port
    ports = [(metrics, METRICS_CONNECTIONS), (target.server.openai_port, OPENAI_CONNECTIONS)]
    with contextlib.ExitStack() as held:
        for port, count in ports:
            for _ in range(count):
                hold(held, port, HALF)
        for _ in range(BODIES):
            hold(held, target.server.openai_port, HALF_BODY + bytes(BODY_BYTES))
        time.sleep(HELD_SECONDS)
        more = process.num_threads() - threads
        with grpc.insecure_channel(target.server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            ended = code(lambda: stub.Generate(request("abc"), timeout=target.seconds / 4))
    return Outcome(f"{more} more threads; a new caller: {ended}", more < METRICS_CONNECTIONS / 2 and ended == "OK")


def hold(held: contextlib.ExitStack, port: int, data: bytes) -> None:
    """Sends bytes over a connection of its own, as far as anybody reads them, and keeps it open."""
    with contextlib.suppress(OSError):
        connection = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=1))
        connection.settimeout(0.2)
        connection.sendall(data)


def prepare_waiting(target: Target) -> None:
    """The budget has room for `late` or `filler` beside `dora`. `late` leaves."""
    for name in ("late", "filler"):
        load(target.server, name, f"org/{name}")


def strike_waiting(target: Target) -> Outcome:
    """The adapter comes while the calls wait; the device takes long to take it."""
    target.world.failpoints.set("adapter", "hold")
    ended: Counter[str] = Counter()
    try:
        wanted = request("abc", "late", new_tokens=1)
        calls = []
        for _ in range(WAITING_CALLS):
            calls.append(target.server.generation.Generate.future(wanted, timeout=target.seconds / 2))
            time.sleep(0.005)  # what is measured are the calls that wait, not that they come all at once
        for call in calls:
            ended[code(call.result)] += 1
    finally:
        target.world.failpoints.clear()
    return Outcome(counted(ended), True)


def deep_stacks() -> tuple[str, ...]:
    """Flags of stacks of as many positions as are permitted, which have little in common."""
    dice = random.Random(0)
    flags = []
    for i in range(DEEP_STACKS):
        starts = [dice.randrange(5) for _ in range(DEEP_POSITIONS // 2)]
        flags.append(f"--stack=deep{i}={','.join(f'{start}-{start + 2}' for start in starts)}")
    return ("--kv-bytes=256MiB", *flags)


def strike_plans(target: Target) -> Outcome:
    def call(i: int) -> None:
        list(stream(target.server, request("abc", stack=f"deep{i}", new_tokens=1), timeout=target.seconds))

    ended = codes([partial(call, i) for i in range(DEEP_STACKS)], DEEP_STACKS)
    # Deep stacks wait for one another, and leave others as much time as they take.
    return Outcome(counted(ended), set(ended) <= {"OK", "DEADLINE_EXCEEDED"})


def prepare_names(target: Target) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: load(target.server, f"name{i}", "org/named"), range(NAMES)))


def strike_scrapes(target: Target) -> Outcome:
    over = threading.Event()
    scrapes: list[int] = []

    def scrape() -> None:
        while not over.is_set():
            with urllib.request.urlopen(target.server.metrics_url, timeout=60) as response:
                scrapes.append(len(response.read()))

    threads = [threading.Thread(target=scrape) for _ in range(SCRAPERS)]
    for thread in threads:
        thread.start()
    time.sleep(SCRAPE_SECONDS)
    over.set()
    for thread in threads:
        thread.join()
    return Outcome(f"{len(scrapes)} scrapes", True)


def publish(repository: str, **config: object) -> Callable[..., None]:
    return lambda world, folder: publish_adapter(world, folder, repository, config=config)


def publish_waiting(world, folder) -> None:
    for name in ("late", "filler"):
        publish_adapter(world, folder, f"org/{name}", config=ADAPTERS["lora"])


ATTACKS = [
    Attack("A2", f"two requests of {STOP_TOKENS:,} stop tokens", strike_stop_tokens),
    Attack("A3", "a prompt of 7,500,000 tokens and 500,000 chat messages as JSON, 15 MB each", strike_bodies),
    Attack(
        "A4",
        f"{LONG_CALLS} callers one after the other, with a text of 4 MiB each, leave after {LEAVE_SECONDS} s",
        strike_leaving,
        flags=("--max-calls=16",),
    ),
    Attack(
        "A8",
        f"{METRICS_CONNECTIONS + OPENAI_CONNECTIONS:,} half requests and {BODIES} half bodies at the HTTP ports",
        strike_connections,
    ),
    Attack(
        "A11",
        f"{WAITING_CALLS} requests wait for one adapter that is on its way",
        strike_waiting,
        publish_waiting,
        flags=("--adapter-bytes=56KB",),
        prepare=prepare_waiting,
        failpoints=True,
    ),
    Attack(
        "A11",
        f"{DEEP_STACKS} stacks of {DEEP_POSITIONS} positions join a batch and leave it",
        strike_plans,
        flags=deep_stacks(),
    ),
    Attack(
        "A12",
        f"{SCRAPERS} scrapers of the metrics, with {NAMES:,} named adapters",
        strike_scrapes,
        publish("org/named", r=1, target_modules=["q_proj"], layers_to_transform=[0]),
        prepare=prepare_names,
    ),
]
