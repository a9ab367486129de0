"""Detection of a dead engine while it answers requests."""

from collections.abc import Awaitable, Callable

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send
from cluster.errors import EngineDeadError

ERROR_EVENTS = (b'data: {"error"', b"event: error")
"""Beginnings of a stream's event that is an error: OpenAI's and Anthropic's form."""


class RaiseIfDead:
    """Middleware that raises instead of sending the error messages of a dead engine.

    vLLM puts the text of its exception into the answer, as a 500 or as an event of the stream.
    """

    def __init__(self, app: ASGIApp, check_health: Callable[[], Awaitable[None]]) -> None:
        self._app = app
        self._check_health = check_health

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            EngineDeadError: The application failed, and the engine is dead.
        """
        dead: EngineDeadError | None = None

        async def send_if_alive(message: Message) -> None:
            nonlocal dead
            if _is_failure(message):
                try:
                    await self._check_health()
                except EngineDeadError as error:
                    dead = error
            if dead is None:
                await send(message)

        try:
            await self._app(scope, receive, send_if_alive)
        except EngineDeadError:
            raise
        except Exception:
            await self._check_health()
            raise
        if dead is not None:
            raise dead


def _is_failure(message: Message) -> bool:
    if message["type"] == "http.response.body":
        return bool(message.get("body", b"").startswith(ERROR_EVENTS))
    return bool(message["type"] == "http.response.start" and message["status"] >= 500)
