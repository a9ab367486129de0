"""A replica's spans of one request: its own part, and the engine's work inside of it."""

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
    """An engine's application, each call of which is a span of the replica and one of the engine.

    The engine is told the latter as ``traceparent``, so that what it traces itself comes below.

    Args:
        app: The engine's application.
        tracer: The process'.
        model: The pool's name.
        provider: Which engine it is (``gen_ai.provider.name``).
        route_of: The template of a path; None where it is not one of the engine's.
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
        self._known = {names.REQUEST_MODEL: model, names.PROVIDER: provider}
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        method, route = scope["method"], self._route_of(scope["path"]) or "other"
        http = {names.METHOD: method, names.ROUTE: route}
        parent = parent_of(scope["headers"])
        replica = self._tracer.start(f"{method} {route}", SpanKind.SERVER, parent, http)
        operation = names.operation_of(route)
        known = {names.OPERATION: operation, **self._known}
        name = f"{operation} {known[names.REQUEST_MODEL]}"
        engine = self._tracer.start(name, SpanKind.INTERNAL, replica, known)
        inside = {**scope, "headers": headers_under(engine, scope["headers"])}
        try:
            await self._app(inside, receive, _watched(send, replica, engine))
        except BaseException as error:
            fail(engine, type(error).__name__)
            fail(replica, type(error).__name__)
            raise
        finally:
            set_usage(engine, usage_of(scope))
            engine.end()
            replica.end()


def _watched(send: Send, replica: Span, engine: Span) -> Send:
    """``send`` that notes the status and the first chunk; itself where nothing is recorded."""
    if not engine.is_recording():
        return send
    begun = time.perf_counter()
    first_due = True

    async def watch(message: Message) -> None:
        nonlocal first_due
        if message["type"] == "http.response.start":
            set_http_status(replica, message["status"])
        elif first_due and message.get("body"):
            first_due = False
            engine.set_attribute(names.FIRST_CHUNK, time.perf_counter() - begun)
        await send(message)

    return watch
