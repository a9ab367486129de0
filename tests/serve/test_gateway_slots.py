"""Slots, times and usage of requests whose clients read slowly or disconnect."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn

from cluster.asgi import WRITE, Message, Receive, Scope, Send, usage_of
from cluster.errors import LinkClosedError
from cluster.gateway.messages import Request, Response, bytes_response
from cluster.usage import Usage
from tests import asgi
from tests.serve.gateway_kit import CHAT, ROUTES, World, gateway_world, metrics

EVENT = b"data: 1\n\n"


class Counting:
    """Application that counts usage: 7 prompt tokens, and one token for each event it sends."""

    def __init__(self, num_events: int, *, ends: bool, event: bytes = EVENT) -> None:
        self._num_events = num_events
        self._ends = ends
        self._event = event
        self.num_sent = 0
        self.sent = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        usage = usage_of(scope)
        usage.prompt_tokens = 7
        try:
            await self._stream(usage, send)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _stream(self, usage: Any, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(self._num_events):
            usage.completion_tokens += 1
            body = {"type": "http.response.body", "body": self._event, "more_body": True}
            await send(body)
            self.num_sent += 1
        self.sent.set()
        if not self._ends:
            await asyncio.Future()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class SlowClient:
    """A client that reads nothing after the first chunk until ``gate`` is set."""

    def __init__(self, world: World, body: Any) -> None:
        self.gate = asyncio.Event()
        self.chunks: list[bytes] = []
        call = asgi.start(self._slow(world.app), "POST", CHAT, body)
        self.done: Callable[[], Any] = call.done

    def _slow(self, app: Any) -> Any:
        async def slow_app(scope: Scope, receive: Receive, send: Send) -> None:
            async def slow_send(message: Message) -> None:
                if self.chunks:
                    await self.gate.wait()
                if body := message.get("body"):
                    self.chunks.append(body)
                await send(message)

            del scope["extensions"][WRITE]  # nothing is written past ``slow_send``
            await app(scope, receive, slow_send)

        return slow_app


async def completion_tokens(world: World) -> float:
    found = await metrics(world)
    return found["tandem_completion_tokens_total", "gen"]


async def test_slow_reader_holds_no_slot_after_the_replica_has_finished() -> None:
    async with gateway_world() as world:
        await world.serve(Counting(500, ends=True), "gen", "gen-1", ROUTES)
        began = time.monotonic()
        client = SlowClient(world, {"model": "gen"})
        await world.until(lambda: bool(client.chunks))
        await world.until_idle()
        took_s = time.monotonic() - began
        assert await completion_tokens(world) == 500
        await asyncio.sleep(0.3)
        client.gate.set()
        await client.done()
        assert b"".join(client.chunks) == EVENT * 500
        found = await metrics(world)
        assert found["tandem_requests_total", "gen", CHAT, "200"] == 1
        # The times are those of the replica, not of the client, which waited 0.3 s.
        assert found["tandem_request_seconds_sum", "gen"] <= took_s
        assert found["tandem_itl_seconds_sum", "gen"] <= took_s


@pytest.mark.parametrize("is_slow", [False, True])
async def test_a_slow_reader_teaches_nothing_about_the_replica(
    monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    async with gateway_world() as world:
        event = b"data: " + b"1" * (10_000 if is_slow else 1) + b"\n\n"
        app = Counting(100, ends=True, event=event)
        await world.serve(app, "gen", "gen-1", ROUTES)
        replicas = world.gateway.pools["gen"].replicas
        learned: list[Any] = []

        def note(original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda slot, usage: (learned.append(usage), original(slot, usage))[1]

        for name in ("record_answer", "release_slot"):
            monkeypatch.setattr(replicas, name, note(getattr(replicas, name)))
        client = SlowClient(world, {"model": "gen"})
        await world.until(lambda: bool(client.chunks))
        if is_slow:  # more than the link's window is unread, so the replica waits
            sent = 0
            while app.num_sent > sent:
                sent = app.num_sent
                await asyncio.sleep(0.3)
            assert sent < 100
        client.gate.set()
        await client.done()
        await world.until_idle()
        assert await completion_tokens(world) == 100
        assert learned == ([None] if is_slow else [Usage(7, 0, 100)] * 2)


async def test_client_that_reads_nothing_is_disconnected() -> None:
    async with gateway_world(client_timeout_s=1) as world:
        app = Counting(1000, ends=True, event=b"data: " + b"1" * 10_000 + b"\n\n")
        await world.serve(app, "gen", "gen-1", ROUTES)
        client = SlowClient(world, {"model": "gen"})
        await world.until(lambda: bool(client.chunks))
        assert world.gateway.num_open_requests == 1  # more than the link's window is unread
        with pytest.raises(ConnectionResetError, match="read nothing for 1 s"):
            await client.done()
        await world.until_idle()
        assert app.cancelled == 1


async def test_large_answer_that_nobody_reads_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway_world(client_timeout_s=1) as world:
        errors: list[Exception] = []

        async def respond(_: Request) -> Response:
            return bytes_response(200, b"text/plain", bytes(50_000_000))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await world.app(scope, receive, send)
            except Exception as error:
                errors.append(error)
                raise

        monkeypatch.setattr(world.gateway, "respond", respond)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            config = uvicorn.Config(app, log_level="critical", lifespan="off")
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve([listener]))
            host, port = listener.getsockname()
            _, writer = await asyncio.open_connection(host, port, limit=1024)
            try:
                writer.write(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
                await world.until(lambda: bool(errors))
                assert "read nothing for 1 s" in str(errors[0])
            finally:
                writer.transport.abort()
                server.should_exit = True
                await serving


async def test_answer_whose_head_cannot_be_sent_leaves_no_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timers: list[asyncio.TimerHandle] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def record(*args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        timers.append(call_later(*args, **kwargs))
        return timers[-1]

    async def failing_app(scope: Scope, receive: Receive, _: Send) -> None:
        async def fail(_: Message) -> None:
            raise OSError("no connection")

        await world.app(scope, receive, fail)

    async with gateway_world(client_timeout_s=54_321) as world:
        monkeypatch.setattr(loop, "call_later", record)
        with pytest.raises(OSError, match="no connection"):
            await asgi.start(failing_app, "GET", "/health", None).done()
        long = [timer for timer in timers if timer.when() > loop.time() + 10_000]
        assert long
        assert all(timer.cancelled() for timer in long)


async def test_disconnected_client_pays_for_the_tokens_until_then() -> None:
    async with gateway_world() as world:
        app = Counting(50, ends=False)
        await world.serve(app, "gen", "gen-1", ROUTES)
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await call.chunks(1)
        await asyncio.wait_for(app.sent.wait(), 30)
        await call.cancel()
        await world.until_idle()
        assert await completion_tokens(world) == 50
        assert (await metrics(world))["tandem_requests_total", "gen", CHAT, "499"] == 1


async def test_client_that_disconnects_before_the_first_byte_pays_for_its_prompt() -> None:
    async with gateway_world() as world:
        app = Counting(0, ends=False)
        await world.serve(app, "gen", "gen-1", ROUTES)
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await asyncio.wait_for(app.sent.wait(), 30)
        await call.cancel()
        await world.until_idle()
        assert (await metrics(world))["tandem_prompt_tokens_total", "gen"] == 7


class Stubborn(Counting):
    """Application that does not end when it is cancelled, once."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            await asyncio.sleep(30)


async def test_usage_is_awaited_for_a_limited_time() -> None:
    async with gateway_world() as world:
        app = Stubborn(5, ends=False)
        await world.serve(app, "gen", "gen-1", ROUTES)
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await call.chunks(1)
        await call.cancel()
        assert world.gateway.num_open_requests == 1
        await world.until_idle(20.0)
        assert (await metrics(world))["tandem_requests_total", "gen", CHAT, "499"] == 1


async def test_usage_is_not_awaited_from_a_lost_replica() -> None:
    async with gateway_world() as world:
        app = Stubborn(5, ends=False)
        await world.serve(app, "gen", "gen-1", ROUTES)
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await call.chunks(1)
        await call.cancel()
        await world.gateway.pools["gen"].replicas.running[0].link.close()
        assert world.gateway.num_open_requests == 0


async def test_head_request_is_not_logged_as_a_disconnect() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        answer = await asgi.call(world.app, "HEAD", "/v1/responses/abc")
        assert (answer.status, answer.body) == (200, b"")
        found = await metrics(world)
        route = "/v1/responses/{response_id}"
        assert found["tandem_requests_total", "gen", route, "200"] == 1


async def test_queued_requests_are_not_sent_to_a_replica_whose_link_was_lost() -> None:
    async with gateway_world() as world:
        await world.serve(Counting(1, ends=False), "gen", "gen-1", ROUTES)
        pool = world.gateway.pools["gen"]
        running = [asgi.start(world.app, "POST", CHAT, {"model": "gen"}) for _ in range(2)]
        for call in running:
            await call.chunks(1)
        queued = [asgi.start(world.app, "POST", CHAT, {"model": "gen"}) for _ in range(4)]
        await world.until(lambda: len(pool.queue) == 4)
        for connection in list(world.servers["gen-1"].connections):
            connection.fail(LinkClosedError("killed"))
        await world.until(lambda: pool.replicas.num_ready == 0)
        await asyncio.sleep(0)
        assert len(pool.queue) == 4
        await world.until(lambda: len(pool.queue) == 2)  # the link is connected again
        found = await metrics(world)
        assert found["tandem_failovers_total", "gen", "refused"] == 0
        for call in running + queued:
            await call.cancel()


async def test_a_pool_of_full_replicas_has_no_room() -> None:
    async with gateway_world(generator={"max_in_flight": 1}) as world:
        queue = world.gateway.pools["gen"].queue
        assert not queue.has_room
        replica = await world.add("gen", "gen-1")
        assert queue.has_room
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen", "wait_before": True})
        await world.until(lambda: bool(replica.bodies))
        assert not queue.has_room
        replica.gate.set()
        await call.done()
        await world.until(lambda: queue.has_room)
