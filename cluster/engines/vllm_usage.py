"""Counts the tokens of each HTTP request where vLLM makes them, whatever its answer's format.

The application's request and the engine's are joined by a context variable: vLLM calls ``generate``
in the task that runs the application, or in one started from it. Does not import vllm.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from functools import wraps
from typing import Any

from cluster.asgi import ASGIApp, Receive, Scope, Send, usage_of
from cluster.usage import UsageCounter

_usage: ContextVar[UsageCounter | None] = ContextVar("usage", default=None)

Generate = Callable[..., AsyncGenerator[Any, None]]
"""``AsyncLLM.generate``: yields vLLM's ``RequestOutput``s, each with the tokens that are new."""


class CountUsage:
    """Lets ``counted`` generators inside ``app`` fill in the scope's usage."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        _usage.set(usage_of(scope))
        await self._app(scope, receive, send)


def counted(generate: Generate) -> Generate:
    """``generate``, whose outputs are counted for the request that it is called for."""

    @wraps(generate)
    async def count(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        usage = _usage.get() or UsageCounter()
        async with aclosing(generate(*args, **kwargs)) as outputs:
            first = True
            async for output in outputs:
                if first:
                    first = False
                    usage.prompt_tokens += len(output.prompt_token_ids or ())
                    usage.cached_tokens += output.num_cached_tokens or 0
                for completion in output.outputs:
                    usage.completion_tokens += len(completion.token_ids)
                yield output

    return count
