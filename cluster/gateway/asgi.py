"""ASGI application of the gateway: reads requests, and writes each chunk of a response at once."""

import asyncio
from contextlib import aclosing
from typing import Any

from cluster.admission import OPEN
from cluster.asgi import Receive, Scope, Send, is_cancelled_of, write_of
from cluster.errors import HeadersTooLargeError, LinkError, RequestError
from cluster.gateway.error_formats import is_anthropic
from cluster.gateway.gateway import Gateway
from cluster.gateway.messages import (
    BodyStream,
    Headers,
    Request,
    Response,
    error_response,
    header,
    request_id,
)
from cluster.gateway.pools.delegation import CALLER_HEADER, read_caller
from cluster.gateway.pools.relayed_body import RelayedBody
from cluster.gateway.serve_http import client_headers


class GatewayApp:
    """ASGI application that serves a gateway; the lifespan protocol has no effect.

    Args:
        gateway: The gateway to serve.
        authenticates: True if requests need an API key, provided that any is configured.
        behind_serve: True if called by Ray Serve's HTTP server, which sets ``x-request-id`` itself.
    """

    def __init__(
        self, gateway: Gateway, *, authenticates: bool = True, behind_serve: bool = False
    ) -> None:
        self._gateway = gateway
        self._authenticates = authenticates
        self._behind_serve = behind_serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003, "reason": "HTTP only"})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = client_headers(scope)
        method = scope["method"]
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        gateway = self._gateway
        path, model = gateway.split_model_path(path)
        id_, identity, body, stream = "", OPEN, b"", None
        try:
            id_ = request_id(header(headers, b"x-request-id"))
            self._check_headers(headers, scope)
            # Before the body is read, so that a client without a key cannot make us buffer one.
            if self._authenticates:
                identity = gateway.authenticate(path, headers)
            else:
                identity = read_caller(headers)
            if gateway.streams_body(method, path):
                stream = BodyStream(receive, gateway.client_timeout_s)
                reads_body = True
            elif reads_body := gateway.needs_body(method, path):
                body = await gateway.buffers.receive(headers, receive, identity.tenant.name)
        except RequestError as error:
            id_ = id_ or request_id(None)  # the client's is what is wrong
            gateway.record_rejection(path, error, id_, identity.tenant.name)
            response, reads_body = error_response(error, path), False
        else:
            size = len(body)
            query = scope["query_string"]
            request = Request(id_, method, path, query, headers, body, identity, model)
            request.is_cancelled = is_cancelled_of(scope)
            request.stream = stream
            del body  # the request drops it when the answer begins
            try:
                response = await gateway.respond(request)
            finally:
                request.release_body()
                gateway.buffers.release(size, identity.tenant.name)
            reads_body = reads_body and (stream is None or stream.is_complete)
        if not reads_body and _has_body(headers):
            # The rest of the body is not read, so the connection cannot be reused.
            response.headers.append((b"connection", b"close"))
        if id_ and not self._behind_serve:
            response.headers.append((b"x-request-id", id_.encode()))
        if id_ and is_anthropic(path):
            response.headers.append((b"request-id", id_.encode()))
        if isinstance(response.body, RelayedBody) and method != "HEAD":
            response.body.write = write_of(scope)
        await _send(response, method, send, gateway.client_timeout_s)

    def _check_headers(self, headers: Headers, scope: Scope) -> None:
        # A router wrote the sender's identity, so it does not count as a header of the client.
        counted = (pair for pair in headers if self._authenticates or pair[0] != CALLER_HEADER)
        size = sum(len(name) + len(value) for name, value in counted)
        size += len(scope["path"]) + len(scope["query_string"])
        if size > self._gateway.max_header_bytes:
            raise HeadersTooLargeError(
                f"Headers and path are {size} bytes; the limit is "
                f"{self._gateway.max_header_bytes} bytes."
            )


def _has_body(headers: Headers) -> bool:
    length = header(headers, b"content-length") or "0"
    return length != "0" or header(headers, b"transfer-encoding") is not None


async def _send(response: Response, method: str, send: Send, stall_timeout_s: float) -> None:
    start: dict[str, Any] = {"type": "http.response.start", "status": response.status}
    async with aclosing(response.body) as body:
        guard = _StallGuard(stall_timeout_s)
        try:
            # Servers wait at the start of a send until the client has read the previous one.
            await send({**start, "headers": response.headers})
            guard.is_sending = False
            guard.num_sent += 1
            async for chunk in body:
                if method != "HEAD":  # its body is read, too, so that the replica finishes
                    guard.is_sending = True
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    guard.is_sending = False
                    guard.num_sent += 1
            guard.is_sending = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (LinkError, RequestError) as error:
            # The status is sent already; only closing the connection still shows the error.
            raise ConnectionResetError(str(error)) from error
        except asyncio.CancelledError as error:
            guard.raise_if_stalled(error)
            raise
        finally:
            guard.stop()


class _StallGuard:
    """Cancels the current task if a client reads nothing for ``timeout_s``; ``stop`` it at the end.

    The request, its slot and its chunks are then released. ASGI cannot abort a connection: after an
    exception the server closes it, which discards nothing that it has already accepted. The rest
    stays in the server's buffer until HAProxy closes the connection (``client_timeout_s``, too).
    """

    def __init__(self, timeout_s: float) -> None:
        self.is_sending = True
        self.num_sent = 0
        self._timeout_s = timeout_s
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._num_seen = 0
        self._progress_s = self._loop.time()
        self._has_stalled = False
        self._timer = self._loop.call_later(timeout_s / 4, self._check)

    def stop(self) -> None:
        self._timer.cancel()

    def raise_if_stalled(self, error: asyncio.CancelledError) -> None:
        if self._has_stalled and self._task is not None:
            self._task.uncancel()
            raise ConnectionResetError(
                f"The client read nothing for {self._timeout_s:g} s."
            ) from error

    def _check(self) -> None:
        if not self.is_sending or self.num_sent != self._num_seen:
            self._num_seen = self.num_sent
            self._progress_s = self._loop.time()
        elif self._loop.time() - self._progress_s >= self._timeout_s and self._task is not None:
            self._has_stalled = True
            self._task.cancel()
            return
        self._timer = self._loop.call_later(self._timeout_s / 4, self._check)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
