"""The gateway as an ASGI application: HTTP in, one write for each chunk that the relay gives."""

from contextlib import aclosing
from typing import Any

from cluster.admission import OPEN
from cluster.asgi import Receive, Scope, Send
from cluster.errors import LinkError, PayloadTooLargeError, RequestError
from cluster.gateway.gateway import Gateway
from cluster.gateway.messages import Headers, Request, Response, error_response, header, request_id
from cluster.gateway.pools.routes import OTHER


class GatewayApp:
    """Serves a gateway over HTTP; a lifespan is accepted and does nothing.

    Args:
        gateway: What answers.
        authenticates: Whether requests need an API key, where any is configured.
        behind_serve: Whether Ray Serve's own server calls this; it sends ``x-request-id`` back
            itself.
    """

    def __init__(
        self, gateway: Gateway, *, authenticates: bool = True, behind_serve: bool = False
    ) -> None:
        self._gateway = gateway
        self._authenticates = authenticates
        self._behind_serve = behind_serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection event of ASGI."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003, "reason": "HTTP only"})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        method = scope["method"]
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        name, identity = "", OPEN
        try:
            name = request_id(header(headers, b"x-request-id"))
            if self._authenticates:
                identity = self._gateway.authenticate(path, headers)
            body = await _read_body(headers, receive, self._gateway.max_body_bytes)
        except RequestError as error:
            self._gateway.refuse(OTHER, error, name)
            # What is left of the body is not read, so the connection cannot be used again.
            response = error_response(error)
            response.headers.append((b"connection", b"close"))
        else:
            response = await self._gateway.respond(
                Request(name, method, path, scope["query_string"], headers, body, identity)
            )
        if name and not self._behind_serve:
            response.headers.append((b"x-request-id", name.encode()))
        await _send(response, method, send)


async def _read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    declared = header(headers, b"content-length") or ""
    chunks: list[bytes] = []
    size = 0
    while True:
        if max(size, int(declared) if declared.isdigit() else 0) > limit:
            raise PayloadTooLargeError(f"The request body may have at most {limit} bytes.")
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client left before its request was complete")
        chunk = message.get("body", b"")
        size += len(chunk)
        chunks.append(chunk)
        if not message.get("more_body", False) and size <= limit:
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _send(response: Response, method: str, send: Send) -> None:
    start: dict[str, Any] = {"type": "http.response.start", "status": response.status}
    async with aclosing(response.body) as body:
        await send({**start, "headers": response.headers})
        if method != "HEAD":
            try:
                async for chunk in body:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except (LinkError, RequestError) as error:
                # The head is out, so the only honest end is to break the connection.
                raise ConnectionResetError(str(error)) from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
