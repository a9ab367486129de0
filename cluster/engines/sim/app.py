"""The simulated engine's ASGI application: finds the endpoint, and answers errors as vLLM does."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.asgi import Receive, Scope, Send
from cluster.engines.sim import anthropic, openai, responses
from cluster.engines.sim.generation import GenerationError
from cluster.engines.sim.http import Exchange, Host, read_body
from cluster.engines.sim.parse import Refusal
from cluster.engines.sim.wire import DONE, error_body, error_event

Endpoint = Callable[[Host, Exchange], Awaitable[None]]

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


_OPENAPI_PATH = "/openapi.json"  # served, but for the router: not one of ``routes``


class SimApp:
    """ASGI over one simulated engine."""

    routes = tuple(_ENDPOINTS)

    def __init__(self, host: Host) -> None:
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a client that leaves, or a cancel, ends its work in the engine."""
        if scope["type"] != "http":
            raise RuntimeError(f"the simulated engine speaks http, not {scope['type']}")
        body = await read_body(receive)
        if body is None:
            return
        exchange = Exchange(scope, body, send)
        answer = asyncio.ensure_future(_answer(self._host, scope["method"], exchange))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answer.done():
                answer.cancel()
                await asyncio.wait((answer,))
        if not answer.cancelled():
            answer.result()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(host: Host, method: str, exchange: Exchange) -> None:
    try:
        await _endpoint(host, method, exchange)
    except Refusal as refusal:
        await exchange.reply(refusal.status, refusal.body())
    except GenerationError as error:
        if not exchange.streaming:
            await exchange.reply(500, error_body(str(error), 500))
            return
        await exchange.write(error_event(str(error)))
        await exchange.write(DONE)
        await exchange.end_stream()


async def _endpoint(host: Host, method: str, exchange: Exchange) -> None:
    found: Any = _ENDPOINTS.get(exchange.path)
    if exchange.path == _OPENAPI_PATH and method == "GET":
        await exchange.reply(200, _openapi())
    elif found is None:
        await exchange.reply(404, {"detail": "Not Found"})
    elif found[0] != method:
        allow = (b"allow", found[0].encode())
        await exchange.reply(405, {"detail": "Method Not Allowed"}, allow)
    else:
        await found[1](host, exchange)


def _openapi() -> dict[str, Any]:
    paths = {
        path: {method.lower(): {"responses": {"200": {"description": "As vLLM answers"}}}}
        for path, (method, _) in _ENDPOINTS.items()
    }
    return {"openapi": "3.1.0", "info": {"title": "sim", "version": "0"}, "paths": paths}
