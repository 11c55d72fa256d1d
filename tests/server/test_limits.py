"""A server of one place: who does not fit, and who does not read, is told so, and nobody else notices."""

from __future__ import annotations

import re
from collections.abc import Iterator

import grpc
import pytest
from lorarep.v1 import generation_pb2_grpc

from tests.server.conftest import World
from tests.server.running import SECONDS, Server, request, serving, stream, wait_for

LONG = request("x", "lora", new_tokens=500)


@pytest.fixture(scope="module")
def small(world: World) -> Iterator[Server]:
    flags = ["--adapter=lora=org/lora", "--max-sequences=1", "--max-queued=1", "--openai-listen=127.0.0.1:0"]
    # Patience for a reader that reads and is not given a core to.
    with serving([*world.flags(), *flags, "--max-unread=8", "--max-unread-seconds=5"], world.env) as server:
        yield server.wait_ready()


def test_a_full_queue_refuses_at_once_with_a_hint(small: Server) -> None:
    running = stream(small, LONG)
    next(m for m in running if m.chunk.token_ids)
    waiting = stream(small, LONG)
    next(waiting)
    with pytest.raises(grpc.RpcError) as error:
        small.generation.Generate(LONG, timeout=SECONDS)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_queued" in error.value.details()
    assert int(dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    for call in (running, waiting):
        assert not call.done()
        call.cancel()
    small.wait_idle()


def test_a_reader_that_does_not_read_ends_alone(small: Server) -> None:
    """What it leaves unread fills its connection's window; the batch goes on, and the next in the queue starts."""
    window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
    with grpc.insecure_channel(small.address, options=window) as channel:
        slow = generation_pb2_grpc.GenerationServiceStub(channel)
        wanted = request("x" * 200, "lora", new_tokens=300, logprobs=20)
        logged = len(small.log)  # of the test before, that may still be on its way: it is another method's
        call = stream(small, wanted, stub=slow)
        next(m for m in call if m.chunk.token_ids)  # the first message may come while it still waits
        # Queued behind it: answered only if the engine does not wait for the reader.
        alone = small.generation.Generate(request("abc", "lora"), timeout=SECONDS)
        assert len(alone.token_ids) == 12
        ended = re.compile(r"GenerateStream\b.*RESOURCE_EXHAUSTED")
        wait_for(lambda: any(map(ended.search, small.log[logged:])), "the stream to end")
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "slow reader" in error.value.details()
    small.wait_idle()
