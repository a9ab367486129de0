import asyncio

import pytest

from cluster.asgi import Receive, Scope, Send
from cluster.engines.leave import CancelAsLeave
from tests import asgi


class Detached:
    """Works in a task of its own until the client leaves, as vLLM's handlers do."""

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


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
async def test_detached_work_ends_with_its_client(how: str) -> None:
    app = Detached()
    call = asgi.start(CancelAsLeave(app), "POST", "/", {})
    while app.work is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    if how == "cancel":
        await call.cancel()
        assert call.answer.status == 0
    else:
        call.disconnect()
        await call.done()
        assert call.answer.status == 200
    assert app.work.cancelled()


async def test_a_cancel_during_the_body_ends_the_call() -> None:
    app = CancelAsLeave(Detached())
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
        await asyncio.wait_for(call, 1)


async def test_errors_pass() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await asgi.post(CancelAsLeave(app), "/", {})
