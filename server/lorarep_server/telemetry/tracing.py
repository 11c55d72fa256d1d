"""OpenTelemetry: a span for each request, with its time in the queue, in prefill and in decoding inside.

Attributes are those of OpenTelemetry's conventions for generative AI. The trace that a caller is in comes from its
call's metadata, by the W3C's Trace Context (`traceparent`) or as OTEL_PROPAGATORS says; sampling and the exporter have
their OTEL_ variables too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorarep_runtime.errors import FailedPrecondition, InvalidArgument
from lorarep_runtime.request import Finished
from lorarep_server.errors import code_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span

MAX_ATTRIBUTE = 256
"""Characters; callers may name what there is not."""
LAST_SPANS = 2.0
"""Seconds for what is unsent at the end."""


@dataclass
class Traced:
    """A request on its way. Times are `time.monotonic_ns()`."""

    metadata: Mapping[str, str]
    model: str
    """Names of its adapters, joined by commas, or of its stack, or of the base."""
    began: int = field(default_factory=time.monotonic_ns)
    submitted: int = 0
    """When the engine was given it."""
    prompt_tokens: int = 0


class Traces:
    """Spans of requests, sent to a collector from a thread of their own. Without an endpoint nothing is done."""

    def __init__(self, endpoint: str | None) -> None:
        """
        Args:
            endpoint: of a collector that takes OTLP over gRPC, such as "http://collector:4317"; https is TLS.

        Raises:
            InvalidArgument: it is neither http nor https.
            FailedPrecondition: OpenTelemetry is not installed.
        """
        self._provider: Any = None
        if endpoint is None:
            return
        if not endpoint.startswith(("http://", "https://")):
            raise InvalidArgument(f"{endpoint!r} does not begin with http:// or https://", field="traces_endpoint")
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import SpanLimits, TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise FailedPrecondition("needs `pip install 'lorarep[traces]'`", field="traces_endpoint") from error
        resource = Resource({SERVICE_NAME: "lorarep"}).merge(OTELResourceDetector().detect())
        limits = SpanLimits(max_span_attribute_length=MAX_ATTRIBUTE)
        self._provider = TracerProvider(resource=resource, span_limits=limits, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("lorarep")

    def end(self, traced: Traced, end: Finished | BaseException) -> None:
        """Has a request's spans sent. They are made once it is over: what its phases took is known then."""
        if self._provider is None:
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        # To nanoseconds since the epoch, by one difference for all, whatever is done to the system's clock meanwhile.
        epoch = time.time_ns() - time.monotonic_ns()
        attributes = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": traced.model,
            "gen_ai.usage.input_tokens": traced.prompt_tokens,
        }
        span: Span = self._tracer.start_span(
            "generate", extract(traced.metadata), SpanKind.SERVER, attributes, start_time=epoch + traced.began
        )
        if isinstance(end, Finished):
            span.set_attribute("gen_ai.usage.output_tokens", end.completion_tokens)
            span.set_attribute("gen_ai.response.finish_reasons", [end.reason.value])
            at, times = epoch + traced.submitted, end.timings
            for phase, seconds in (("queue", times.queued), ("prefill", times.prefill), ("decode", times.decode)):
                inner = self._tracer.start_span(phase, set_span_in_context(span), start_time=at)
                at += round(1e9 * seconds)
                inner.end(at)
        else:
            code = code_of(end).name
            span.set_attribute("error.type", code)
            span.set_status(StatusCode.ERROR, code)
        span.end(epoch + time.monotonic_ns())

    def close(self) -> None:
        """Sends what is left, for as long as there is patience. Blocks."""
        if self._provider is not None:
            closing = threading.Thread(target=self._provider.shutdown, daemon=True)
            closing.start()
            closing.join(LAST_SPANS)
