"""The spans that an OpenTelemetry collector receives over OTLP."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import grpc
import pytest
from fmaas import generation_pb2 as fmaas
from lorarep_server.telemetry.tracing import Traces
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from lorarep_runtime.errors import FailedPrecondition
from tests.support.callers import request, stream
from tests.support.servers import SECONDS, Server, lorarep, serving, wait_for
from tests.support.world import World

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
PHASES = ("queue", "prefill", "decode")


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.port = 0

    def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any) -> Any:
        for sent in request.resource_spans:
            self.services |= {a.value.string_value for a in sent.resource.attributes if a.key == "service.name"}
            for scope in sent.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def take(self, count: int) -> list[Span]:
        """Waits for so many spans, removes them, and returns them."""
        wait_for(lambda: len(self.spans) >= count, "the spans")
        taken, self.spans = self.spans, []
        assert len(taken) == count
        return taken


@contextmanager
def collecting() -> Iterator[Collector]:
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector
    server.stop(None)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


def flags(world: World, port: int) -> list[str]:
    return [*world.flags(), "--openai-listen=127.0.0.1:0", f"--traces-endpoint=http://127.0.0.1:{port}"]


@pytest.fixture(scope="module")
def traced(world: World, collector: Collector) -> Iterator[Server]:
    env = {**world.env, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with serving([*flags(world, collector.port), "--adapter=lora=org/lora"], env) as server:
        yield server.wait_ready()


def attributes(span: Span) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_request_is_a_span_of_its_callers_trace(traced: Server, collector: Collector) -> None:
    metadata = (("traceparent", TRACEPARENT),)
    before = time.time_ns()
    answer = traced.generation.Generate(request("abc", "lora", new_tokens=5), metadata=metadata, timeout=SECONDS)
    after = time.time_ns()
    spans = {span.name: span for span in collector.take(4)}
    assert spans.keys() == {"generate", *PHASES}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    whole = spans["generate"]
    assert (whole.parent_span_id.hex(), whole.kind) == (PARENT, Span.SPAN_KIND_SERVER)
    given = attributes(whole)
    assert [reason.string_value for reason in given.pop("gen_ai.response.finish_reasons").values] == ["length"]
    assert given == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "lora",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
    }
    inner = [spans[phase] for phase in PHASES]
    assert {span.parent_span_id for span in inner} == {whole.span_id}
    # Each phase begins where the previous one ends. All are within the request's span, and that is within the call.
    for one, next_one in pairwise(inner):
        assert one.end_time_unix_nano == next_one.start_time_unix_nano
    places = [before, whole.start_time_unix_nano, inner[0].start_time_unix_nano]
    places += [inner[-1].end_time_unix_nano, whole.end_time_unix_nano, after]
    assert places == sorted(places)
    for span, phase in zip(inner, ("queued", "prefill", "decode"), strict=True):
        assert seconds(span) == pytest.approx(getattr(answer.timings, phase).ToNanoseconds() / 1e9, abs=1e-6)
    assert 0 < sum(map(seconds, inner)) <= seconds(whole)
    assert collector.services == {"lorarep"}


def test_requests_of_every_api_are_traced(traced: Server, collector: Collector) -> None:
    metadata = (("traceparent", TRACEPARENT),)
    list(stream(traced, request("abc", stack="base"), metadata=metadata, timeout=SECONDS))
    wanted = fmaas.BatchedGenerationRequest(requests=[fmaas.GenerationRequest(text="abc")] * 2)
    wanted.params.stopping.max_new_tokens = 3
    traced.fmaas.Generate(wanted, metadata=metadata, timeout=SECONDS)
    with traced.openai() as client:
        headers = {"traceparent": TRACEPARENT}
        list(client.completions.create(model="lora", prompt="abc", stream=True, max_tokens=3, extra_headers=headers))
        client.completions.create(model="lora", prompt="abc", max_tokens=3)
    spans = collector.take(20)
    whole = [span for span in spans if span.name == "generate"]
    models = [attributes(span)["gen_ai.request.model"] for span in whole]
    assert sorted(models) == ["base", "lora", "lora", "org/base", "org/base"]
    parents = [span.parent_span_id.hex() for span in whole]
    assert sorted(parents) == ["", *[PARENT] * 4]
    for span in whole:
        inner = [other for other in spans if other.parent_span_id == span.span_id]
        assert {other.name for other in inner} == set(PHASES)
        assert {other.trace_id for other in inner} == {span.trace_id}


@pytest.mark.usefixtures("slow_steps")
def test_a_request_that_fails_is_a_span_with_its_error(traced: Server, collector: Collector) -> None:
    for metadata in ((), (("traceparent", "no such thing"),)):
        with pytest.raises(grpc.RpcError):
            traced.generation.Generate(request("abc", "x" * 1000), metadata=metadata, timeout=SECONDS)
        (span,) = collector.take(1)
        assert (span.status.code, span.status.message) == (Status.STATUS_CODE_ERROR, "NOT_FOUND")
        given = attributes(span)
        assert (given["error.type"], given["gen_ai.request.model"]) == ("NOT_FOUND", "x" * 256)
        assert span.parent_span_id == b""
    call = stream(traced, request("abc", "lora", new_tokens=500))
    next(call)
    call.cancel()
    (span,) = collector.take(1)
    assert attributes(span)["error.type"] == "CANCELLED"


def test_what_is_unsent_at_the_end_is_sent(world: World) -> None:
    with collecting() as collector:
        env = {**world.env, "OTEL_BSP_SCHEDULE_DELAY": str(1000 * SECONDS)}
        with serving(flags(world, collector.port), env) as server:
            server.wait_ready().generation.Generate(request("abc"), timeout=SECONDS)
            assert not collector.spans
            assert server.stop() == 0
        collector.take(4)


def test_a_collector_that_is_not_there_holds_nobody_up(world: World) -> None:
    with serving(flags(world, 9), world.env) as server:
        server.wait_ready().generation.Generate(request("abc"), timeout=SECONDS)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 30


def test_without_the_extra_an_endpoint_is_refused_and_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    Traces(None).close()
    with pytest.raises(FailedPrecondition, match=r"traces_endpoint: needs .*lorarep\[traces\]"):
        Traces("http://collector:4317")


def test_an_endpoint_has_to_be_an_address_of_http(world: World) -> None:
    done = lorarep("serve", *world.flags(), "--traces-endpoint=collector:4317", env=world.env)
    assert done.returncode == 1
    assert "traces_endpoint: 'collector:4317' does not begin with http" in done.stderr
