"""Cancelling a call ends the work of an application that works in a detached task."""

import asyncio

import pytest

from cluster.asgi import Receive, Scope, Send
from cluster.engines.vllm.disconnect import CancelAsDisconnect
from tests import asgi


class DetachedApp:
    """Works in a task of its own until the client disconnects, as vLLM's handlers do."""

    def __init__(self) -> None:
        self.work: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.request"
        self.work = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
        while (await receive())["type"] != "http.disconnect":
            pass
        self.work.cancel()
        await asyncio.wait((self.work,))
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def start(app: DetachedApp) -> asgi.Call:
    call = asgi.start(CancelAsDisconnect(app), "POST", "/", {})
    while app.work is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return call


async def test_cancelling_the_call_ends_detached_work_and_sends_nothing() -> None:
    app = DetachedApp()
    call = await start(app)
    await call.cancel()
    assert app.work is not None
    assert app.work.cancelled()
    assert call.answer.status == 0


async def test_a_disconnect_is_passed_on() -> None:
    app = DetachedApp()
    call = await start(app)
    call.disconnect()
    await call.done()
    assert app.work is not None
    assert app.work.cancelled()
    assert call.answer.status == 200


async def test_a_cancellation_while_the_body_is_received_ends_the_call() -> None:
    app = CancelAsDisconnect(DetachedApp())
    never = asyncio.Event()

    async def receive() -> dict[str, str]:
        await never.wait()
        return {}

    async def send(message: object) -> None:
        raise AssertionError

    call = asyncio.create_task(app({"type": "http"}, receive, send))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, 60)


async def test_errors_of_the_application_are_raised() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await asgi.post(CancelAsDisconnect(app), "/", {})
