"""Shows a prefix tracker each prompt as its client wrote it and as vLLM tokenized it.

Joined like ``vllm_usage`` by a context variable. Does not import vllm.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from functools import wraps
from typing import Any

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send
from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.vllm_usage import Generate
from cluster.routing.fingerprint import PROMPT_PATHS, Fingerprint, fingerprint


class _Body:
    """A request's body as far as it was received; given away once."""

    def __init__(self, path: str, receive: Receive) -> None:
        self._path = path
        self._receive = receive
        self._pieces: list[bytes] | None = [] if path in PROMPT_PATHS else None

    async def receive(self) -> Message:
        message = await self._receive()
        if self._pieces is not None and message["type"] == "http.request":
            self._pieces.append(message.get("body", b""))
        return message

    def take(self) -> Fingerprint | None:
        """The fingerprint, for the first who asks: it is the first prompt's."""
        if self._pieces is None:
            return None
        body, self._pieces = b"".join(self._pieces), None
        return fingerprint(self._path, body)


_body: ContextVar[_Body | None] = ContextVar("body", default=None)


class KeepBody:
    """Lets ``shown`` generators inside ``app`` know the body that they are called for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = _Body(scope["path"], receive)
        _body.set(body)
        await self._app(scope, body.receive, send)


def shown(generate: Generate, tracker: PrefixTracker) -> Generate:
    """``generate``, whose prompts ``tracker`` is told."""

    @wraps(generate)
    async def show(prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        body = _body.get()
        if body is not None and (text := body.take()) is not None:
            given = prompt if isinstance(prompt, dict) else {}
            token_ids = given.get("prompt_token_ids")
            lora = kwargs.get("lora_request")
            if token_ids and not given.get("cache_salt"):  # salted blocks are nobody else's
                tracker.asked(text, token_ids, lora.lora_name if lora is not None else "")
        async with aclosing(generate(prompt, *args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    return show
