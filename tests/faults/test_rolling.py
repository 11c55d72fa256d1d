"""A rolling update: one of two servers ends under load, another replaces it, and no stream breaks."""

from __future__ import annotations

import json
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import grpc
from lorarep.v1 import generation_pb2_grpc

from tests.faults.conftest import assert_nothing_left_at_the_end
from tests.support.callers import request, stream
from tests.support.servers import Server, serving, wait_for
from tests.support.world import World

STREAMS = 200
AT_ONCE = 12
KINDS = [request(f"stream {i}", *names, new_tokens=8 + i) for i, names in enumerate([(), ("lora",), ("dora",)] * 3)]
SERVICE = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "readiness"},
    "methodConfig": [
        {
            "name": [{"service": "lorarep.v1.GenerationService"}],
            "retryPolicy": {  # applies to streams without a message so far
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
OPTIONS = (
    ("grpc.service_config", json.dumps(SERVICE)),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


def test_a_rolling_update_under_load_breaks_no_stream(world: World, server: Server) -> None:
    alone = [server.generation.Generate(wanted).token_ids for wanted in KINDS]
    flags = [*world.flags(), "--adapter=lora=org/lora", "--adapter=dora=org/dora"]
    with ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as callers:

        def start(*more: str) -> Server:
            return stack.enter_context(serving([*flags, *more], world.env))

        leaving, staying = (one.wait_ready() for one in [start(), start()])
        addresses = f"ipv4:{leaving.address},{staying.address}"
        balanced = generation_pb2_grpc.GenerationServiceStub(
            stack.enter_context(grpc.insecure_channel(addresses, OPTIONS))
        )

        def ask(number: int) -> bool:
            call = stream(server, KINDS[number % len(KINDS)], stub=balanced, timeout=120)
            return [token for message in call for token in message.chunk.token_ids] == alone[number % len(KINDS)]

        under_way = [callers.submit(ask, number) for number in range(STREAMS)]
        wait_for(lambda: sum(map(Future.done, under_way)) > STREAMS // 10, "some to end")
        leaving.process.send_signal(signal.SIGTERM)
        assert all(answer.result() for answer in under_way)
        assert leaving.process.wait(60) == 0
        assert served(leaving)
        assert served(staying) > STREAMS // 2
        assert_nothing_left_at_the_end(leaving)
        staying.wait_idle()
        new = start(f"--listen={leaving.address}").wait_ready()
        wait_for(lambda: ask(0) and served(new), "the new one to be asked", 30)


def served(server: Server) -> int:
    """The number of streams that a server has answered."""
    return sum("GenerateStream OK" in line for line in server.log)
