"""The gateway as an ASGI application: HTTP in, one write for each chunk that the relay gives."""

from contextlib import aclosing
from typing import Any

from cluster.engines.base import Receive, Scope, Send
from cluster.errors import LinkError, PayloadTooLargeError, RequestError
from cluster.gateway.gateway import Gateway
from cluster.gateway.messages import Request, Response, error_response, request_id


class GatewayApp:
    """Serves a gateway over HTTP; a lifespan is accepted and does nothing."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

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
        given = next((value for name, value in headers if name == b"x-request-id"), b"")
        identity = request_id(given.decode("latin-1"))
        try:
            body = await _read_body(headers, receive, self._gateway.max_body_bytes)
        except RequestError as error:
            refusal = error_response(error)
            refusal.headers.append((b"x-request-id", identity.encode()))
            refusal.headers.append((b"connection", b"close"))
            await _send(refusal, scope["method"], send)
            return
        request = Request(
            identity, scope["method"], scope["path"], scope["query_string"], headers, body
        )
        await _send(await self._gateway.respond(request), request.method, send)


async def _read_body(headers: list[tuple[bytes, bytes]], receive: Receive, limit: int) -> bytes:
    declared = next((value for name, value in headers if name == b"content-length"), b"0")
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
