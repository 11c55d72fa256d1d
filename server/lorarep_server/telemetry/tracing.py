"""OpenTelemetry traces: a span for each request, with inner spans for its queue, prefill and decode phases.

Attributes follow OpenTelemetry's conventions for generative AI. The caller's trace comes from the metadata of its call,
in the W3C's Trace Context (`traceparent`) or as OTEL_PROPAGATORS says. OTEL_ variables configure sampling and the
exporter.
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
"""Most characters of an attribute; callers may send names of any length."""
LAST_SPANS = 2.0
"""Seconds to send the remaining spans at the end."""


@dataclass
class TracedRequest:
    """The data of a running request that its span needs. Times are by `time.monotonic_ns()`."""

    metadata: Mapping[str, str]
    """The metadata or the headers of the call, which may name the caller's trace."""
    model: str
    """The names of the request's adapters, joined by commas; or of its stack; or of the base."""
    began: int = field(default_factory=time.monotonic_ns)
    """The time when the call began."""
    submitted: int = 0
    """The time when the request was submitted to the engine."""
    prompt_tokens: int = 0


class Traces:
    """Sends the spans of requests to a collector, from a thread of its own. Without an endpoint it does nothing."""

    def __init__(self, endpoint: str | None) -> None:
        """
        Args:
            endpoint: URL of a collector that accepts OTLP over gRPC, such as "http://collector:4317"; https is TLS.

        Raises:
            InvalidArgument: the endpoint is neither http nor https.
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

    def end(self, traced: TracedRequest, end: Finished | BaseException) -> None:
        """Makes and sends the spans of a request that is over, when the durations of its phases are known."""
        if self._provider is None:
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        # Nanoseconds since the epoch, by the same difference for all spans: the system's clock may be set meanwhile.
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
        """Sends the remaining spans, for at most LAST_SPANS seconds. Blocks."""
        if self._provider is not None:
            closing = threading.Thread(target=self._provider.shutdown, daemon=True)
            closing.start()
            closing.join(LAST_SPANS)
