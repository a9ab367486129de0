"""Spans of a request in the router: one for the request, one per attempt on a replica."""

from collections.abc import Mapping, Sequence

from opentelemetry.trace import Span, SpanKind
from opentelemetry.util.types import AttributeValue

from cluster.tracing import Headers, names
from cluster.tracing.tracer import (
    Tracer,
    fail,
    headers_under,
    parent_of,
    set_http_status,
    set_usage,
)
from cluster.usage import Usage


class RequestTrace:
    """Spans of one request, from its admission to the end of its response; call ``end``.

    The header ``traceparent`` may name the caller's span. ``route`` is the template of the path.
    """

    __slots__ = ("_attempts", "_link", "_span", "_tracer")

    def __init__(
        self,
        tracer: Tracer,
        headers: Sequence[tuple[bytes, bytes]],
        method: str,
        route: str,
        attributes: Mapping[str, AttributeValue],
    ) -> None:
        all_attributes = {names.METHOD: method, names.ROUTE: route, **attributes}
        parent = parent_of(headers)
        self._span = tracer.start(f"{method} {route}", SpanKind.SERVER, parent, all_attributes)
        self._tracer = tracer
        self._link: Span | None = None
        self._attempts = 0

    def start_attempt(
        self, headers: Headers, replica_id: str, address: tuple[str, int], way: str
    ) -> Headers:
        """Start the span of an attempt, ending the previous one as lost; return headers to send."""
        if self._link is not None:
            fail(self._link, "lost")
            self._link.end()
        self._attempts += 1
        attributes: dict[str, AttributeValue] = {
            names.REPLICA: replica_id,
            names.SERVER_ADDRESS: address[0],
            names.SERVER_PORT: address[1],
            names.LINK_WAY: way,
            names.ATTEMPT: self._attempts,
        }
        self._link = self._tracer.start("link", SpanKind.CLIENT, self._span, attributes)
        return headers_under(self._link, headers)

    def end(
        self, status: int, queue_s: float | None, first_chunk_s: float | None, usage: Usage | None
    ) -> None:
        """End the spans; times are None if the request stayed queued or had no first chunk."""
        span = self._span
        if queue_s is not None:
            span.set_attribute(names.QUEUE, queue_s)
        if first_chunk_s is not None:
            span.set_attribute(names.FIRST_CHUNK, first_chunk_s)
        if usage is not None:
            set_usage(span, usage)
        for open_span in (self._link, span):
            if open_span is not None:
                set_http_status(open_span, status)
                open_span.end()
