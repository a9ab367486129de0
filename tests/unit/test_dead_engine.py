"""Answers of an engine that dies while it answers."""

import pytest

from cluster.asgi import ASGIApp, Message, Receive, Scope, Send
from cluster.engines.dead import RaiseIfDead
from cluster.errors import EngineDeadError

TEXT = b"EngineCore encountered an issue."


def start(status: int) -> Message:
    return {"type": "http.response.start", "status": status, "headers": []}


def body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


def replies(*messages: Message, error: Exception | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if error is not None:
            raise error

    return app


async def healthy() -> None:
    pass


async def dead() -> None:
    raise EngineDeadError("The engine died.")


async def receive() -> Message:
    raise AssertionError


FAILURES = {
    "status": replies(start(500), body(TEXT)),
    "openai event": replies(start(200), body(b'data: {"error": {}}\n\n'), body(b"data: [DONE]")),
    "anthropic event": replies(start(200), body(b"event: error\ndata: {}\n\n")),
    "exception": replies(start(200), error=RuntimeError(TEXT.decode())),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_failures_of_a_dead_engine_raise_a_typed_error(name: str) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(EngineDeadError, match="The engine died"):
        await RaiseIfDead(FAILURES[name], dead)({}, receive, send)
    assert sent in ([], [start(200)])


async def test_failures_of_a_living_engine_are_sent() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await RaiseIfDead(FAILURES["openai event"], healthy)({}, receive, send)
    assert len(sent) == 3
    with pytest.raises(RuntimeError):
        await RaiseIfDead(FAILURES["exception"], healthy)({}, receive, send)
