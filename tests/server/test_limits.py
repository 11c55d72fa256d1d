"""Limits of a server that runs one request: a full queue and slow readers are refused, and others see nothing."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import grpc
import openai
import pytest
from fmaas import generation_pb2 as fmaas_pb2
from lorarep.v1 import generation_pb2_grpc
from lorarep.v1.generation_pb2 import GenerateStreamRequest, TokenizeRequest
from lorarep_server.api.grpc_fmaas import FmaasService
from lorarep_server.api.openai import OpenAI
from lorarep_server.api.openai_choices import collect
from lorarep_server.api.openai_requests import CompletionRequest
from lorarep_server.app import App
from lorarep_server.requests.event_stream import EventStream

from lorarep_runtime.config import SchedulerConfig
from lorarep_runtime.errors import InvalidArgument
from lorarep_runtime.request import Finished, FinishReason, Output, Timings
from tests.support.callers import refused, request, stream
from tests.support.servers import SECONDS, Server, serving, wait_for
from tests.support.world import World

LONG = request("x", "lora", new_tokens=500)


@pytest.fixture(scope="module")
def small(world: World) -> Iterator[Server]:
    adapters = ["--adapter=lora=org/lora", "--adapter=dora=org/dora", "--openai-listen=127.0.0.1:0"]
    # Long enough for a reader that is only waiting for a core.
    limits = ["--max-sequences=1", "--max-queued=1", "--max-unread=8", "--max-unread-seconds=5"]
    with serving([*world.flags(), *adapters, *limits], world.env) as server:
        yield server.wait_ready()


@pytest.mark.usefixtures("slow_steps")
def test_a_full_queue_refuses_at_once_with_a_hint(small: Server) -> None:
    running = stream(small, LONG)
    next(m for m in running if m.chunk.token_ids)
    waiting = stream(small, LONG)
    next(waiting)
    batch = fmaas_pb2.BatchedGenerationRequest(requests=[fmaas_pb2.GenerationRequest(text="x")])
    for generate, wanted in ((small.generation.Generate, LONG), (small.fmaas.Generate, batch)):
        with pytest.raises(grpc.RpcError) as error:
            generate(wanted, timeout=SECONDS)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_queued" in error.value.details()
        assert int(dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    for call in (running, waiting):
        assert not call.done()
        call.cancel()
    small.wait_idle()


@pytest.mark.usefixtures("slow_steps")
def test_over_http_a_full_queue_is_429_with_a_hint(small: Server) -> None:
    running = stream(small, LONG)
    next(m for m in running if m.chunk.token_ids)
    waiting = stream(small, LONG)
    next(waiting)
    with small.openai() as client:
        for streams in (False, True):
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(model="lora", prompt="x", max_tokens=500, stream=streams)
            told = error.value
            assert (told.status_code, told.type, told.param) == (429, "rate_limit_error", "max_queued")
            headers = told.response.headers
            assert int(headers["retry-after"]) == int(headers["retry-after-ms"]) / 1000 > 0
        for call in (running, waiting):
            assert not call.done()
            call.cancel()
        small.wait_idle()
        # A client that follows the hint gets an answer.
        assert client.completions.create(model="lora", prompt="x", max_tokens=4).choices
    small.wait_idle()


def test_calls_that_are_refused_before_they_are_requests_are_counted(small: Server) -> None:
    def counts() -> dict[str, float]:
        prefix = "lorarep_requests_finished_total{reason="
        return {
            name.removeprefix(prefix)[:-1]: value for name, value in small.metrics().items() if name.startswith(prefix)
        }

    def change(before: dict[str, float]) -> dict[str, float]:
        changes = {reason: count - before.get(reason, 0) for reason, count in counts().items()}
        return {reason: count for reason, count in changes.items() if count}

    before, bad_text = counts(), fmaas_pb2.GenerationRequest(text="x")
    with small.openai() as client:
        for fields in (dict(n=2), dict(extra_body={"unknown": 1})):
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="lora", prompt="x", **fields)
    params = fmaas_pb2.Parameters(method="SAMPLE", sampling=fmaas_pb2.SamplingParameters(typical_p=0.5))
    batch = fmaas_pb2.BatchedGenerationRequest(requests=[bad_text] * 3, params=params)
    refused(lambda: small.fmaas.Generate(batch, timeout=SECONDS), "INVALID_ARGUMENT")
    refused(lambda: list(small.generation.GenerateStream(GenerateStreamRequest())), "INVALID_ARGUMENT", "request")
    assert change(before) == {"invalid_argument": 4}
    before = counts()
    # Once, where the request itself is refused; and not at all where none was meant.
    refused(lambda: small.generation.Generate(request("x", "absent"), timeout=SECONDS), "NOT_FOUND")
    refused(lambda: small.generation.Tokenize(TokenizeRequest(), timeout=SECONDS), "INVALID_ARGUMENT")
    assert change(before) == {"not_found": 1}


def test_over_http_a_reader_that_does_not_read_ends_alone(small: Server) -> None:
    chat = [{"role": "user", "content": "x"}]
    wanted = dict(
        model="dora", messages=chat, max_tokens=480, logprobs=True, top_logprobs=20, stream=True, ignore_eos=True
    )
    body = json.dumps(wanted).encode()
    path = "/v1/chat/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        # Small socket buffers on both sides: otherwise the system would buffer the whole stream.
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        slow.settimeout(SECONDS)
        slow.connect(("127.0.0.1", small.openai_port))
        logged = len(small.log)
        slow.sendall(head.encode() + body)
        got = slow.recv(16)  # may arrive while the request is still queued
        wait_for(lambda: not small.metrics()["lorarep_requests_waiting"], "the stream to begin")
        # This request is queued behind the stream: it is answered only if the engine does not wait for the reader.
        alone = small.generation.Generate(request("abc", "lora"), timeout=SECONDS)
        assert len(alone.token_ids) == 12
        ended = re.compile(f"POST {path} RESOURCE_EXHAUSTED")
        wait_for(lambda: any(map(ended.search, small.log[logged:])), "the stream to end")
        with suppress(ConnectionError):
            while part := slow.recv(1 << 16):
                got += part
    assert got.startswith(b"HTTP/1.1 200 ")
    assert b"data: [DONE]" not in got
    small.wait_idle()


def test_a_reader_that_takes_events_and_does_not_come_back_is_ended() -> None:
    """A reader that needs too long for the events that it took is ended, even if no others are unread."""
    made: list[EventStream] = []

    async def read() -> None:
        made.append(EventStream(max_unread=100, patience=0.05))
        made[0].put(Output((1,), "a", ()))
        await made[0].take()
        await asyncio.sleep(SECONDS)  # like a write to a caller that does not read

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())
    assert "slow reader" in str(made[0].too_slow)


def test_a_request_has_no_more_prompts_than_may_wait_for_one_adapter() -> None:
    limits = SchedulerConfig(max_queued=8, max_queued_per_adapter=3)
    engine = SimpleNamespace(max_tokens=512, config=SimpleNamespace(scheduler=limits))
    served = SimpleNamespace(engine=lambda: engine)
    assert App._message_bounds(served).max_prompts == 3
    http = SimpleNamespace(_frontend=served)
    assert len(OpenAI._to_generates(http, CompletionRequest(model="x", prompt=["x"] * 3), {})) == 3
    with pytest.raises(InvalidArgument, match=r"^n: 4 .* limit of 3$"):
        OpenAI._to_generates(http, CompletionRequest(model="x", prompt=["x"] * 2, n=2), {})
    with pytest.raises(InvalidArgument, match=r"^prompt: 4 .* limit of 3$"):
        OpenAI._to_generates(http, CompletionRequest(model="x", prompt=["x"] * 4), {})
    batch = fmaas_pb2.BatchedGenerationRequest(requests=[fmaas_pb2.GenerationRequest(text="x")] * 4)
    with pytest.raises(InvalidArgument, match=r"^requests: 4 .* limit of 3$"):
        asyncio.run(FmaasService(served).Generate(batch, None))
    assert SchedulerConfig(max_queued=8).max_prompts == 8


def test_a_whole_answer_may_take_longer_to_write_than_a_reader_may() -> None:
    async def answer() -> None:
        events = EventStream(max_unread=100, patience=0.02)
        events.put(Finished(FinishReason.LENGTH, 1, 0, Timings(0, 0, 0)))
        response = SimpleNamespace(choice=lambda outputs, finished: time.sleep(0.2))
        await collect(response, events)
        assert events.too_slow is None

    asyncio.run(answer())


def test_a_reader_that_does_not_read_ends_alone(small: Server) -> None:
    """Unread messages fill the connection's window. The batch goes on, and the next request in the queue starts."""
    window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
    with grpc.insecure_channel(small.address, options=window) as channel:
        slow = generation_pb2_grpc.GenerationServiceStub(channel)
        wanted = request("x" * 200, "lora", new_tokens=300, logprobs=20)
        logged = len(small.log)  # lines of the test before may still arrive; they are of another method
        call = stream(small, wanted, stub=slow)
        next(m for m in call if m.chunk.token_ids)  # the first message may arrive while the request is queued
        # This request is queued behind the stream: it is answered only if the engine does not wait for the reader.
        alone = small.generation.Generate(request("abc", "lora"), timeout=SECONDS)
        assert len(alone.token_ids) == 12
        ended = re.compile(r"GenerateStream\b.*RESOURCE_EXHAUSTED")
        wait_for(lambda: any(map(ended.search, small.log[logged:])), "the stream to end")
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "slow reader" in error.value.details()
    small.wait_idle()
