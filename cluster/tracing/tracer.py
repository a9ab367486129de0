"""Span creation and export over OTLP/HTTP, in a thread of the OpenTelemetry SDK.

The export queue is bounded: if the collector is slow, spans are dropped and requests never wait.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from cluster.config.operations import TracingConfig
from cluster.tracing import Headers, names
from cluster.usage import Usage, UsageCounter

logger = logging.getLogger("ray.serve.tandem")

EXPORT_TIMEOUT_S = 5.0
"""Timeout of an export, and of the last one when the process stops, in seconds."""
MAX_BATCH_SPANS = 512

_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracer:
    """Spans of one process; see ``start_tracer`` for the arguments."""

    def __init__(self, config: TracingConfig, service: str, instance: str) -> None:
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        sampler = ParentBased(TraceIdRatioBased(config.sample_ratio))
        # Not the global provider, which vLLM or Ray may use.
        self._provider = TracerProvider(sampler, resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(
            config.endpoint, headers=config.headers, timeout=EXPORT_TIMEOUT_S
        )
        processor = BatchSpanProcessor(
            exporter,
            max_queue_size=config.max_queued_spans,
            schedule_delay_millis=config.export_interval_s * 1e3,
            max_export_batch_size=min(MAX_BATCH_SPANS, config.max_queued_spans),
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("tandem", version("tandem"))

    def start(
        self,
        name: str,
        kind: SpanKind,
        parent: Span | Context | None,
        attributes: Mapping[str, AttributeValue],
    ) -> Span:
        """Start a span, to be ended by the caller."""
        context = set_span_in_context(parent) if isinstance(parent, Span) else parent
        # Without a parent, use an empty context: the current span is unrelated.
        return self._tracer.start_span(name, context or Context(), kind, attributes)

    async def close(self) -> None:
        """Export the remaining spans, for at most ``EXPORT_TIMEOUT_S``."""
        try:
            async with asyncio.timeout(EXPORT_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)
        except TimeoutError:
            logger.warning(
                "the last spans were not exported within %g s and are lost", EXPORT_TIMEOUT_S
            )


def parent_of(headers: Iterable[tuple[bytes, bytes]]) -> Context:
    """Return the context of a request's ``traceparent``, empty if that is missing or invalid."""
    carrier = {
        name.decode(): value.decode("latin-1")
        for name, value in headers
        if name in _CONTEXT_HEADERS
    }
    return _PROPAGATOR.extract(carrier, Context())


def headers_under(span: Span, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return ``headers`` with ``span`` as the parent for the receiver's spans."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
    kept = [pair for pair in headers if pair[0] not in _CONTEXT_HEADERS]
    return kept + [(name.encode(), value.encode()) for name, value in carrier.items()]


def fail(span: Span, error_type: str) -> None:
    """Mark a span as failed, without the error's message, which may contain a prompt."""
    span.set_attribute(names.ERROR_TYPE, error_type)
    span.set_status(Status(StatusCode.ERROR))


def set_http_status(span: Span, status: int) -> None:
    """Record the status of a response; from 500 on, the span has failed."""
    span.set_attribute(names.STATUS, status)
    if status >= 500:
        fail(span, str(status))


def set_usage(span: Span, usage: Usage | UsageCounter) -> None:
    span.set_attribute(names.INPUT_TOKENS, usage.prompt_tokens)
    span.set_attribute(names.CACHED_TOKENS, usage.cached_tokens)
    span.set_attribute(names.OUTPUT_TOKENS, usage.completion_tokens)
