"""Spans of a request in a replica: one for the replica, one for its engine."""

import time
from collections.abc import Callable

from opentelemetry.trace import Span, SpanKind

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send, usage_of
from cluster.tracing import names
from cluster.tracing.tracer import (
    Tracer,
    fail,
    headers_under,
    parent_of,
    set_http_status,
    set_usage,
)


class TracedApp:
    """Middleware that records a replica span and an engine span per request.

    The engine gets its span as ``traceparent``, so spans that it records itself become children.
    ``route_of`` returns the template of a path, or None if the engine does not serve it.
    """

    def __init__(
        self,
        app: ASGIApp,
        tracer: Tracer,
        model: str,
        provider: str,
        route_of: Callable[[str], str | None],
    ) -> None:
        self._app = app
        self._tracer = tracer
        self._model_attributes = {names.REQUEST_MODEL: model, names.PROVIDER: provider}
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, route = scope["method"], self._route_of(scope["path"]) or "other"
        http = {names.METHOD: method, names.ROUTE: route}
        parent = parent_of(scope["headers"])
        replica = self._tracer.start(f"{method} {route}", SpanKind.SERVER, parent, http)
        operation = names.operation_of(route)
        attributes = {names.OPERATION: operation, **self._model_attributes}
        name = f"{operation} {attributes[names.REQUEST_MODEL]}"
        engine = self._tracer.start(name, SpanKind.INTERNAL, replica, attributes)
        engine_scope = {**scope, "headers": headers_under(engine, scope["headers"])}
        try:
            await self._app(engine_scope, receive, _observe_send(send, replica, engine))
        except BaseException as error:
            fail(engine, type(error).__name__)
            fail(replica, type(error).__name__)
            raise
        finally:
            set_usage(engine, usage_of(scope))
            engine.end()
            replica.end()


def _observe_send(send: Send, replica: Span, engine: Span) -> Send:
    """Wrap ``send`` to record the status and the time to the first chunk."""
    if not engine.is_recording():
        return send
    started = time.perf_counter()
    is_first = True

    async def wrapper(message: Message) -> None:
        nonlocal is_first
        if message["type"] == "http.response.start":
            set_http_status(replica, message["status"])
        elif is_first and message.get("body"):
            is_first = False
            engine.set_attribute(names.FIRST_CHUNK, time.perf_counter() - started)
        await send(message)

    return wrapper
