"""A server's end waits for its last call, and for no longer; long messages are parsed beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from lorarep_server.api import openai_bodies
from lorarep_server.errors import Status
from lorarep_server.requests.admission import LONG_MESSAGE, Admission

UNUSED: Any = None


def test_the_end_waits_for_the_last_call_and_no_longer() -> None:
    async def calls() -> None:
        admission = Admission(2, UNUSED, UNUSED)
        assert await admission.finished(10)
        may_end = [asyncio.Event() for _ in range(2)]
        running = [asyncio.create_task(admission.guard("Generate", event.wait())) for event in may_end]
        await asyncio.sleep(0)
        admission.close()
        refused = await admission.guard("Generate", asyncio.Event().wait())
        assert isinstance(refused, Status)
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        for event, call in zip(may_end, running, strict=True):
            assert not await admission.finished(0.01)
            event.set()
            await call
        assert await admission.finished(10)

    asyncio.run(calls())


def test_long_messages_are_parsed_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over gRPC and over HTTP: parsing one takes seconds, in which all streams would stand still."""
    parsed_in: dict[int, threading.Thread] = {}

    def parse(*given: Any) -> None:
        (data,) = (one for one in given if isinstance(one, bytes))
        parsed_in[len(data)] = threading.current_thread()

    async def answer(request: Any, context: Any) -> None:
        assert request is None

    async def body(request: Any, most: int) -> bytes:
        return request.data

    monkeypatch.setattr(openai_bodies, "_parsed", parse)
    monkeypatch.setattr(openai_bodies, "_body", body)
    bodies = openai_bodies.Bodies(lambda: 1, ignores_unknown=False)
    own = SimpleNamespace(
        response_streaming=False, request_deserializer=parse, response_serializer=None, unary_unary=answer
    )

    async def calls() -> None:
        details: Any = SimpleNamespace(method="/lorarep.v1.Adapters/ListAdapters")
        handler = await Admission(2, UNUSED, UNUSED).intercept_service(lambda _: asyncio.sleep(0, own), details)
        for short in (True, False):
            for extra, call in ((0, lambda data: handler.unary_unary(data, None)), (1, via_http)):
                data = bytes(LONG_MESSAGE + extra + (-2 if short else 2))
                await call(data)
                assert (parsed_in[len(data)] is threading.current_thread()) == short

    def via_http(data: Any) -> Any:
        return bodies.read(UNUSED, SimpleNamespace(content_type="application/json", data=data))

    asyncio.run(calls())
    assert len(parsed_in) == 4
