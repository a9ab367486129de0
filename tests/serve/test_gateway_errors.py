"""Failures before and after the first byte of a response, as the vendors' clients see them."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import anthropic
import httpx
import openai
import pytest
from openai.types.responses import ResponseFailedEvent

from cluster.asgi import Receive, Scope, Send
from cluster.errors import LinkClosedError
from cluster.gateway.pools import relay
from cluster.gateway.pools.retry_budget import MIN_RETRIES
from cluster.link import LinkServer
from tests import asgi
from tests.serve.browser import listening
from tests.serve.gateway_kit import CHAT, World, gateway_world, metrics

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
COMPLETIONS = "/v1/completions"
ROUTES = (CHAT, COMPLETIONS, MESSAGES, RESPONSES, "/other")

CHAT_CHUNK = {
    "id": "c",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "gen",
    "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}],
}
TEXT_DELTA = {
    "type": "content_block_delta",
    "index": 0,
    "delta": {"type": "text_delta", "text": "Hi"},
}
CREATED = {
    "type": "response.created",
    "sequence_number": 0,
    "response": {
        **{"id": "resp_1", "object": "response", "created_at": 1, "model": "gen", "output": []},
        **{"status": "in_progress", "parallel_tool_calls": True, "tool_choice": "auto"},
        "tools": [],
    },
}
OUTPUT_DELTA = {
    "type": "response.output_text.delta",
    "item_id": "i",
    "output_index": 0,
    "content_index": 0,
    "delta": "Hi",
    "logprobs": [],
    "sequence_number": 1,
}


def data(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"


def event(body: Any) -> str:
    return f"event: {body['type']}\n{data(body)}"


class Script:
    """Application that sends a stream's head and these chunks, then waits."""

    def __init__(self, *chunks: str, content_type: str = "text/event-stream") -> None:
        self.chunks = chunks
        self.requests = 0
        self.sent = asyncio.Event()
        self._headers = [(b"content-type", content_type.encode())]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        for chunk in self.chunks:
            body = {"type": "http.response.body", "body": chunk.encode(), "more_body": True}
            await send(body)
        self.sent.set()
        await asyncio.Future()


async def add(world: World, script: Script, name: str = "gen-1") -> LinkServer:
    return await world.serve(script, "gen", name, ROUTES)


async def broken(world: World, path: str, script: Script) -> asgi.Answer:
    """Return the answer to a request whose replica is lost after the script's chunks."""
    server = await add(world, script)
    call = asgi.start(world.app, "POST", path, {"model": "gen"})
    await call.chunks(1)
    await server.stop()
    return await call.done()


# -- before the first byte --------------------------------------------------------------------


async def test_loss_after_the_head_and_before_the_first_byte_is_retried() -> None:
    async with gateway_world() as world:
        await world.add("gen", "gen-1")
        call = asgi.start(world.app, "POST", CHAT, {"stream": 2, "wait_head": True})
        await world.until(lambda: world.servers["gen-1"].num_streams == 1)
        await asyncio.sleep(0.05)  # the head arrives at the router
        assert call.answer.status == 0
        other = await world.add("gen", "gen-2")
        other.gate.set()
        await world.gateway.pools["gen"].replicas.running[0].link.close()
        answer = await call.done()
        assert (answer.status, answer.headers["x-engine"]) == (200, "gen-2")
        assert [event for _, event in answer.events()] == ["0", "1"]


@pytest.mark.parametrize(
    ("first", "status", "says"),
    [
        (
            data({"error": {"message": "top_logprobs", "type": "BadRequestError", "code": 400}}),
            400,
            "top_logprobs",
        ),
        (data({"error": {"message": "no", "type": "NotFoundError", "code": 404}}), 404, "no"),
        (
            event({"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}),
            429,
            "slow",
        ),
        (event({"type": "error", "error": {"type": "odd", "message": "odd"}}), 500, "odd"),
    ],
)
async def test_error_in_the_first_event_becomes_the_status(
    first: str, status: int, says: str
) -> None:
    async with gateway_world() as world:
        await add(world, Script(first, "data: [DONE]\n\n"))
        answer = await asgi.post(world.app, CHAT, {"model": "gen", "stream": True})
        assert answer.status == status
        assert says in answer.json()["error"]["message"]
        assert answer.headers["content-type"] == "application/json"
        assert (await metrics(world))["tandem_requests_total", "gen", CHAT, str(status)] == 1
        assert world.gateway.pools["gen"].num_in_flight == 0


async def test_errors_of_anthropics_api_have_its_format() -> None:
    async with gateway_world(queue_timeout_s=0.1) as world:
        for body, status, kind in [
            ({"model": "nope"}, 404, "not_found_error"),
            ({"model": 3}, 400, "invalid_request_error"),
            ({"model": "gen"}, 503, "overloaded_error"),
        ]:
            answer = await asgi.post(world.app, MESSAGES, body)
            assert (answer.status, answer.json()["type"]) == (status, "error")
            assert answer.json()["error"]["type"] == kind


class Poison:
    """Application that closes its connection, like a process that a request kills."""

    def __init__(self) -> None:
        self.server: LinkServer | None = None
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        assert self.server is not None
        for connection in list(self.server.connections):
            connection.fail(LinkClosedError("killed"))
        await asyncio.Future()


async def add_poisoned(world: World, names: Sequence[str]) -> list[Poison]:
    poisoned = [Poison() for _ in names]
    for each, name in zip(poisoned, names, strict=True):
        each.server = await world.serve(each, "gen", name, ROUTES)
    return poisoned


async def test_request_that_kills_replicas_kills_two_at_most(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with gateway_world() as world:
        poisoned = await add_poisoned(world, ["gen-1", "gen-2", "gen-3", "gen-4"])
        answer = await asgi.post(world.app, CHAT, {"model": "gen"})
        assert answer.status == 503
        assert "try again" in answer.json()["error"]["message"]
        assert sum(each.requests for each in poisoned) == 2
    digest = hashlib.sha256(json.dumps({"model": "gen"}).encode()).hexdigest()
    assert digest[:16] in caplog.text


class Fragile(Poison):
    """Application whose process dies of a request with "poison"; it answers others if it may."""

    def __init__(self, answers: bool) -> None:
        super().__init__()
        self._answers = answers
        self.may_die = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if b"poison" in (await receive())["body"]:
            await self.may_die.wait()
            await super().__call__(scope, receive, send)
        self.requests += 1
        await asyncio.sleep(0.05 if self._answers else 3600)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


async def test_a_request_lost_with_one_that_kills_replicas_is_not_lost_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "_SUSPECT_AGE_S", 60)  # adding a replica takes a while
    async with gateway_world() as world:
        first, second = Fragile(answers=False), Fragile(answers=True)
        first.server = await world.serve(first, "gen", "gen-1", ROUTES)
        other = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        await world.until(lambda: first.requests == 1)
        poison = asgi.start(world.app, "POST", CHAT, {"model": "gen", "user": "poison"})
        await world.until(lambda: world.servers["gen-1"].num_streams == 2)
        second.server = await world.serve(second, "gen", "gen-2", ROUTES)
        for each in (first, second):
            each.may_die.set()
        assert (await other.done()).status == 200
        assert (await poison.done()).status == 503


class Hang(Poison):
    """Application whose process a request stops: its connections stay open, but nothing comes."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        assert self.server is not None
        for connection in self.server.connections:
            connection.write = lambda *_: None  # type: ignore[method-assign]
        await asyncio.Future()

    def wake_up(self) -> None:
        assert self.server is not None
        for connection in self.server.connections:
            connection.__dict__.pop("write", None)


async def test_request_that_hangs_replicas_hangs_two_at_most() -> None:
    async with gateway_world() as world:
        hanging = [Hang() for _ in range(4)]
        for index, each in enumerate(hanging):
            each.server = await world.serve(each, "gen", f"gen-{index}", ROUTES)
        answer = await asgi.post(world.app, CHAT, {"model": "gen"})
        assert answer.status == 503
        assert "2 of 2 replicas were lost" in answer.json()["error"]["message"]
        assert sum(each.requests for each in hanging) == 2
        assert (await metrics(world))["tandem_failovers_total", "gen", "hung"] == 1
        for each in hanging:
            each.wake_up()


async def test_retries_after_losses_are_limited_for_the_whole_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "_SUSPECT_PAUSE_S", (0, 0))  # the budget grows with time
    async with gateway_world(queue_timeout_s=30) as world:
        poisoned = await add_poisoned(world, ["gen-1", "gen-2"])
        for _ in range(3 * MIN_RETRIES):
            assert (await asgi.post(world.app, CHAT, {"model": "gen"})).status == 503
        sent = sum(each.requests for each in poisoned)
        assert sent == 3 * MIN_RETRIES + MIN_RETRIES


async def test_refused_requests_are_retried_without_a_budget() -> None:
    async with gateway_world() as world:
        server = await add(world, Script())
        pool = world.gateway.pools["gen"]
        while pool.retries.take_retry():
            pass
        call = asgi.start(world.app, "POST", CHAT, {"model": "gen"})
        while not pool.num_in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0)
        server.retire()  # before it reads the request
        await world.add("gen", "gen-2", ROUTES, ready=1)
        assert (await call.done()).status == 200


# -- after the first byte ---------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_openai_clients_raise_when_a_stream_breaks(path: str) -> None:
    async with gateway_world() as world, listening(world.app) as url:
        script = Script(data(CHAT_CHUNK))
        server = await add(world, script)
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            if path == CHAT:
                stream: Any = await client.chat.completions.create(
                    model="gen", messages=[{"role": "user", "content": "a"}], stream=True
                )
            else:
                stream = await client.completions.create(model="gen", prompt="a", stream=True)
            first = await anext(aiter(stream))
            assert first.choices[0]
            await server.stop()
            with pytest.raises(openai.APIError, match="The replica stopped") as caught:
                async for _ in stream:
                    pass
            assert caught.value.body["code"] == 503  # type: ignore[index]


async def test_openai_responses_fail_and_raise_when_a_stream_breaks() -> None:
    async with gateway_world() as world, listening(world.app) as url:
        server = await add(world, Script(event(CREATED), event(OUTPUT_DELTA)))
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0
        ) as client:
            stream = await client.responses.create(model="gen", input="a", stream=True)
            events = [await anext(aiter(stream)) for _ in range(2)]
            await server.stop()
            events.append(failed := await anext(aiter(stream)))
            with pytest.raises(openai.APIError, match="The replica stopped"):
                await anext(aiter(stream))
            assert isinstance(failed, ResponseFailedEvent)
            assert [each.sequence_number for each in events] == [0, 1, 2]
            assert (failed.response.id, failed.response.status) == ("resp_1", "failed")
            assert failed.response.error is not None
            assert failed.response.error.code == "server_error"
            assert "The replica stopped" in failed.response.error.message


async def test_a_response_without_a_known_start_ends_with_an_error() -> None:
    async with gateway_world() as world:
        answer = await broken(world, RESPONSES, Script(event(OUTPUT_DELTA)))
        (_, (name, last)) = answer.events()
        assert name == "error"
        assert json.loads(last)["sequence_number"] == 2


async def test_anthropic_clients_raise_when_a_stream_breaks() -> None:
    async with gateway_world() as world, listening(world.app) as url:
        server = await add(world, Script(event(TEXT_DELTA)))
        async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            stream = await client.messages.create(
                model="gen",
                messages=[{"role": "user", "content": "a"}],
                max_tokens=4,
                stream=True,
            )
            assert (await anext(aiter(stream))).type == "content_block_delta"
            await server.stop()
            with pytest.raises(anthropic.APIStatusError, match="The replica stopped"):
                async for _ in stream:
                    pass


@pytest.mark.parametrize("end", ["\n\n", "\n"])
async def test_error_event_starts_on_a_new_event(end: str) -> None:
    async with gateway_world() as world:
        answer = await broken(world, CHAT, Script(data(CHAT_CHUNK).rstrip() + end))
        first, last = answer.data()
        assert first == CHAT_CHUNK
        assert last["error"]["code"] == 503


@pytest.mark.parametrize(
    ("path", "chunk", "content_type"),
    [
        (CHAT, 'data: {"id": "c', "text/event-stream"),  # broken within an event
        ("/other", "data: 1\n\n", "text/event-stream"),  # unknown kind of stream
        (CHAT, '{"id": ', "application/json"),
    ],
)
async def test_connection_is_aborted_if_an_error_event_is_impossible(
    path: str, chunk: str, content_type: str
) -> None:
    async with gateway_world() as world, listening(world.app) as url:
        server = await add(world, Script(chunk, content_type=content_type))
        async with (
            httpx.AsyncClient() as client,
            client.stream("POST", url + path, json={"model": "gen"}) as answer,
        ):
            chunks = answer.aiter_raw()
            assert await anext(chunks) == chunk.encode()
            await server.stop()
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(chunks)
