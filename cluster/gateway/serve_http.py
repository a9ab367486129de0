"""Corrections of Ray Serve's HTTP server, which is uvicorn with Serve's handling of requests.

Serve reads some headers of each request before the gateway does: it fails on bytes that are not
UTF-8, ends requests with a plain text, and lets clients switch off the detection of disconnects.
uvicorn sends chunks to HTTP/1.0 clients, which do not know them.
"""

import logging
from http import HTTPStatus
from typing import Any

from cluster.asgi import WRITE, ASGIApp, Message, Receive, Scope, Send
from cluster.errors import InternalError, RequestError, request_error_for
from cluster.gateway.messages import Headers, error_response

logger = logging.getLogger("ray.serve.tandem")

CLIENT_HEADERS = "tandem.headers"
"""Key of a scope: all headers of the client."""
_ANSWERED = "tandem.answered"

_HIDDEN_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""Headers that Serve would obey. The gateway implements the first, and ignores the other."""


class ServeAdapter:
    """Middleware that hides headers from Serve and formats Serve's own errors.

    Args:
        app: Serve's ASGI application, which calls a ``GatewayApp``.
        writes_directly: False if a middleware must see all pieces of a body.
    """

    def __init__(self, app: ASGIApp, *, writes_directly: bool = True) -> None:
        self._app = app
        self._writes_directly = writes_directly

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        readable = [pair for pair in scope["headers"] if _is_for_serve(*pair)]
        scope = {**scope, "headers": readable, CLIENT_HEADERS: scope["headers"]}
        if not self._writes_directly:
            scope["extensions"] = {}
        answer = _Answer(scope, send)
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            if answer.has_started:
                raise
            logger.exception("Ray Serve failed to handle %s %s", scope["method"], scope["path"])
            await answer.send_error(InternalError("Internal error; the router's log has details."))


def client_headers(scope: Scope) -> Headers:
    """Return all headers of a request with names in lower case; mark the request as answered."""
    scope[_ANSWERED] = True
    headers = scope.get(CLIENT_HEADERS, scope["headers"])
    return [(name.lower(), value) for name, value in headers]


def _is_for_serve(name: bytes, value: bytes) -> bool:
    return name.isascii() and value.isascii() and name.lower() not in _HIDDEN_HEADERS


class _Answer:
    """Response to one request; errors that Serve itself sends get the format of the path's API."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.has_started = False
        self._scope = scope
        self._send = send
        self._error_status = 0  # of Serve's own error, until its text is complete
        self._text = b""

    async def send(self, message: Message) -> None:
        if self._error_status:
            self._text += message.get("body", b"")
            if not message.get("more_body", False):
                text = self._text.decode(errors="replace").strip('"')
                text = text or HTTPStatus(self._error_status).phrase
                await self.send_error(request_error_for(self._error_status, text))
        elif (
            message["type"] == "http.response.start"
            and message["status"] >= 400
            and _ANSWERED not in self._scope
        ):
            self._error_status = message["status"]
        else:
            self.has_started = True
            await self._send(message)

    async def send_error(self, error: RequestError) -> None:
        self.has_started = True
        path = self._scope["path"].removeprefix(self._scope.get("root_path", "").rstrip("/"))
        response = error_response(error, path)
        start = {"type": "http.response.start", "status": error.status}
        await self._send({**start, "headers": response.headers})
        async for chunk in response.body:
            await self._send({"type": "http.response.body", "body": chunk})


def offer_direct_writes() -> None:
    """Let applications of uvicorn write pieces of chunked bodies past Serve's ``send`` functions.

    Otherwise a task wakes up for each token, and five coroutines of Serve, uvicorn and this module
    run: a third of the router's CPU time per token.
    """
    from uvicorn.protocols.http import httptools_impl

    class Cycle(httptools_impl.RequestResponseCycle):
        async def run_asgi(self, app: Any) -> None:
            scope: Scope = self.scope  # type: ignore[assignment]
            scope.setdefault("extensions", {})[WRITE] = self.write
            try:
                await super().run_asgi(app)
            finally:
                del scope["extensions"][WRITE]  # it refers to this object: they would be a cycle

        def write(self, piece: bytes) -> bool:
            if self.flow.write_paused or self.disconnected or self.response_complete:
                return False
            if not self.chunked_encoding or not piece:
                return False
            self.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            return True

    httptools_impl.RequestResponseCycle = Cycle  # type: ignore[misc]


def end_http10_bodies_by_closing() -> None:
    """Let uvicorn end a body of unknown length by closing the connection of an HTTP/1.0 client."""
    from uvicorn.protocols.http import httptools_impl

    class Cycle(httptools_impl.RequestResponseCycle):
        is_open_ended = False

        async def send(self, message: Any) -> None:
            if self.scope["http_version"] == "1.0":
                if not self.response_started:
                    names = [name.lower() for name, _ in message.get("headers", ())]
                    if b"content-length" not in names:
                        self.is_open_ended, self.chunked_encoding = True, False
                elif self.is_open_ended:
                    self.expected_content_length = len(message.get("body", b""))
            await super().send(message)

    httptools_impl.RequestResponseCycle = Cycle  # type: ignore[misc]
