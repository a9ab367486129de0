"""A router's spans of one request: the request as a whole, and each attempt over a link."""

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


class RoutedTrace:
    """From a request's admission to the end of its answer; ``end`` is due.

    Args:
        tracer: The process'.
        headers: The request's, in which a ``traceparent`` may name the caller's span.
        method: Its HTTP method.
        route: Its path as a template.
        attributes: What else is known of it.
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
        known = {names.METHOD: method, names.ROUTE: route, **attributes}
        parent = parent_of(headers)
        self._span = tracer.start(f"{method} {route}", SpanKind.SERVER, parent, known)
        self._tracer = tracer
        self._link: Span | None = None
        self._attempts = 0

    def attempt(
        self, headers: Headers, replica_id: str, address: tuple[str, int], way: str
    ) -> Headers:
        """A replica is asked; returns the headers that it gets. Ends an attempt that was before."""
        if self._link is not None:
            fail(self._link, "lost")
            self._link.end()
        self._attempts += 1
        attributes: dict[str, AttributeValue] = {
            names.REPLICA: replica_id,
            names.SERVER_ADDRESS: address[0],
            names.SERVER_PORT: address[1],
            names.WAY: way,
            names.ATTEMPT: self._attempts,
        }
        self._link = self._tracer.start("link", SpanKind.CLIENT, self._span, attributes)
        return headers_under(self._link, headers)

    def end(
        self,
        status: int,
        queue_s: float | None,
        first_chunk_s: float | None,
        usage: Usage | None,
    ) -> None:
        """It has ended; the times are since its arrival, None where they never came about."""
        span = self._span
        if queue_s is not None:
            span.set_attribute(names.QUEUE, queue_s)
        if first_chunk_s is not None:
            span.set_attribute(names.FIRST_CHUNK, first_chunk_s)
        if usage is not None:
            set_usage(span, usage)
        for ended in (self._link, span):
            if ended is not None:
                set_http_status(ended, status)
                ended.end()
