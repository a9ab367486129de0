"""Makes the spans of one process and sends them by OTLP over HTTP, in a thread of the SDK's.

Owns the provider, whose queue is bounded: spans that a slow collector leaves no room for are
dropped, and no request ever waits for one. Not the global provider: that may be vLLM's or Ray's.
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
"""For one export, and for the last one when the process ends."""
MAX_BATCH_SPANS = 512

_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_PROPAGATOR = TraceContextTextMapPropagator()


class Tracer:
    """The spans of one process; see ``start_tracer`` for the arguments."""

    def __init__(self, config: TracingConfig, service: str, instance: str) -> None:
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        sampler = ParentBased(TraceIdRatioBased(config.sample_ratio))
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
        """Begin a span; ``end`` is due."""
        context = set_span_in_context(parent) if isinstance(parent, Span) else parent
        # An empty context where there is no parent: what happens to be current is not one.
        return self._tracer.start_span(name, context or Context(), kind, attributes)

    async def close(self) -> None:
        """Send what is left, as far as the collector takes it within ``EXPORT_TIMEOUT_S``."""
        try:
            async with asyncio.timeout(EXPORT_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)
        except TimeoutError:
            logger.warning("the last spans could not be sent within %g s", EXPORT_TIMEOUT_S)


def parent_of(headers: Iterable[tuple[bytes, bytes]]) -> Context:
    """The context that a request's ``traceparent`` names; an empty one where that is not valid."""
    carrier = {
        name.decode(): value.decode("latin-1")
        for name, value in headers
        if name in _CONTEXT_HEADERS
    }
    return _PROPAGATOR.extract(carrier, Context())


def headers_under(span: Span, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """``headers``, whose receiver's spans become children of ``span``."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
    kept = [pair for pair in headers if pair[0] not in _CONTEXT_HEADERS]
    return kept + [(name.encode(), value.encode()) for name, value in carrier.items()]


def fail(span: Span, error_type: str) -> None:
    """Mark a span as failed; the error's message may hold a text and stays out."""
    span.set_attribute(names.ERROR_TYPE, error_type)
    span.set_status(Status(StatusCode.ERROR))


def set_http_status(span: Span, status: int) -> None:
    """Note the status of an answer; one of 500 or more is a failure of the server's."""
    span.set_attribute(names.STATUS, status)
    if status >= 500:
        fail(span, str(status))


def set_usage(span: Span, usage: Usage | UsageCounter) -> None:
    """Note the tokens that a request took."""
    span.set_attribute(names.INPUT_TOKENS, usage.prompt_tokens)
    span.set_attribute(names.CACHED_TOKENS, usage.cached_tokens)
    span.set_attribute(names.OUTPUT_TOKENS, usage.completion_tokens)
