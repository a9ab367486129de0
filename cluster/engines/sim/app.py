"""ASGI application of the simulated engine: routing, and errors as vLLM reports them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from cluster.asgi import Receive, Scope, Send, read_body
from cluster.engines.sim import anthropic, openai, responses
from cluster.engines.sim.generation import GenerationError
from cluster.engines.sim.http import HttpExchange
from cluster.engines.sim.parse import ApiError
from cluster.engines.sim.wire import DONE, error_body, error_event

if TYPE_CHECKING:
    from cluster.engines.sim.engine import SimEngine

Endpoint = Callable[["SimEngine", HttpExchange], Awaitable[None]]

_ENDPOINTS: dict[str, tuple[str, Endpoint]] = {
    "/v1/models": ("GET", openai.models),
    "/v1/chat/completions": ("POST", openai.chat),
    "/v1/completions": ("POST", openai.completions),
    "/v1/responses": ("POST", responses.create),
    "/v1/messages": ("POST", anthropic.messages),
    "/v1/messages/count_tokens": ("POST", anthropic.count_tokens),
    "/tokenize": ("POST", openai.tokenize),
    "/detokenize": ("POST", openai.detokenize),
}

_OPENAPI_PATH = "/openapi.json"  # served for the router only; not one of ``routes``


class SimApp:
    """ASGI application of one simulated engine."""

    routes = tuple(_ENDPOINTS)

    def __init__(self, engine: "SimEngine") -> None:
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; a disconnect or a cancellation aborts it in the engine."""
        if scope["type"] != "http":
            raise RuntimeError(f"the simulated engine serves http only, got {scope['type']}")
        body = await read_body(receive)
        if body is None:
            return
        exchange = HttpExchange(scope, body, send)
        response = asyncio.ensure_future(_respond(self._engine, scope["method"], exchange))
        disconnect = asyncio.ensure_future(_cancel_on_disconnect(receive, response))
        try:
            await asyncio.wait((response,))
        finally:
            disconnect.cancel()
            # Retrieves the result, too: a client that left may have made a write fail.
            ended = await asyncio.gather(response, disconnect, return_exceptions=True)
        if isinstance(ended[0], Exception):
            raise ended[0]


async def _cancel_on_disconnect(receive: Receive, response: "asyncio.Future[None]") -> None:
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    finally:
        response.cancel()


async def _respond(engine: "SimEngine", method: str, exchange: HttpExchange) -> None:
    try:
        await _dispatch(engine, method, exchange)
    except ApiError as error:
        await exchange.reply(error.status, error.body())
    except GenerationError as error:
        if not exchange.is_streaming:
            await exchange.reply(500, error_body(str(error), 500))
            return
        await exchange.write(error_event(str(error)))
        await exchange.write(DONE)
        await exchange.end_stream()


async def _dispatch(engine: "SimEngine", method: str, exchange: HttpExchange) -> None:
    found: Any = _ENDPOINTS.get(exchange.path)
    if exchange.path == _OPENAPI_PATH and method == "GET":
        await exchange.reply(200, _openapi())
    elif found is None:
        await exchange.reply(404, {"detail": "Not Found"})
    elif found[0] != method:
        allow = (b"allow", found[0].encode())
        await exchange.reply(405, {"detail": "Method Not Allowed"}, allow)
    else:
        await found[1](engine, exchange)


def _openapi() -> dict[str, Any]:
    operation = {
        "summary": "Answer as vLLM does.",
        "tags": ["vLLM"],
        "responses": {"200": {"description": "OK"}},
    }
    paths = {path: {method.lower(): operation} for path, (method, _) in _ENDPOINTS.items()}
    return {"openapi": "3.1.0", "info": {"title": "sim", "version": "0"}, "paths": paths}
