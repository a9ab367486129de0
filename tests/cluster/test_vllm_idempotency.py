"""Repeated requests join a running answer of vLLM; its engine core follows a script."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import pytest_asyncio

from cluster.engines.vllm.engine import VllmEngine
from tests import asgi
from tests.cluster.scripted_vllm import MODEL, ScriptedCore, scripted_engine, write_model
from tests.serve.gateway_kit import World, gateway_world, metrics

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
WORDS = " ".join(["Once upon a time there was a fox."] * 8)
KEY = {"idempotency-key": "k-1"}
Scripted = tuple[VllmEngine, ScriptedCore]

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scripted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scripted]:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    async with scripted_engine(directory) as started:
        started[1].script = lambda request: WORDS
        yield started


@asynccontextmanager
async def routers(engine: VllmEngine, **idempotency: Any) -> AsyncIterator[tuple[World, World]]:
    options: dict[str, Any] = {"generator": {"name": MODEL}, "idempotency": idempotency}
    async with gateway_world(**options) as first, gateway_world(**options) as second:
        await first.serve(engine.app, MODEL, "one", engine.routes(), resume_key=engine.resume_key)
        second.running[MODEL] = first.running[MODEL]
        second.update(MODEL)
        await second.until(lambda: second.gateway.pools[MODEL].replicas.num_ready == 1)
        yield first, second


def body(path: str, *, stream: bool) -> dict[str, Any]:
    limit = {RESPONSES: "max_output_tokens"}.get(path, "max_tokens")
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "Tell me a story."}]}
    if path == RESPONSES:
        question = {"input": "Tell me a story."}
    elif stream:
        question["stream_options"] = {"include_usage": True}
    return {"model": MODEL, "stream": stream, limit: 500, **question}


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_an_answer_survives_its_router(scripted: Scripted, path: str, stream: bool) -> None:
    engine, core = scripted
    num_requests, core.step_s = len(core.requests), 0.01
    async with routers(engine) as (first, second):
        call = asgi.start(first.app, "POST", path, body(path, stream=stream), KEY)
        if stream:
            await call.chunks(5)
        else:
            await first.until(lambda: len(core.requests) > num_requests)
        await first.gateway.close()
        with suppress(ConnectionResetError):
            await call.done()
        assert WORDS not in text_of(call.answer)
        retry = await asgi.start(second.app, "POST", path, body(path, stream=stream), KEY).done()
        assert retry.status == 200
        assert WORDS in text_of(retry)
        assert retry.headers["idempotent-replayed"] == "true"
        assert len(core.requests) == num_requests + 1
        assert not core.aborted
        await second.until_idle()
        counts = await metrics(second)
        assert counts["tandem_completion_tokens_total", MODEL] > 60  # charged once, here
        again = await asgi.start(second.app, "POST", path, body(path, stream=stream), KEY).done()
        assert again.body == retry.body
        await second.until_idle()
        after = await metrics(second)
        name = ("tandem_completion_tokens_total", MODEL)
        assert after[name] == counts[name]


async def test_vllm_aborts_the_request_if_nobody_repeats_it(scripted: Scripted) -> None:
    engine, core = scripted
    core.step_s = 0.1
    async with routers(engine, disconnect_grace_s=1.5) as (first, _):
        call = asgi.start(first.app, "POST", CHAT, body(CHAT, stream=True), KEY)
        await call.chunks(2)
        began = time.monotonic()
        await call.cancel()
        await first.until(lambda: bool(core.aborted))
        assert time.monotonic() - began >= 1.5
        core.aborted.clear()


def text_of(answer: asgi.Answer) -> str:
    """Return the text of an answer of either API."""
    if not answer.chunks:
        return ""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        reply = answer.json()
        if "choices" in reply:
            return str(reply["choices"][0]["message"]["content"])
        return "".join(part["text"] for item in reply.get("output", ()) for part in item["content"])
    found = ""
    for event in answer.data():
        for choice in event.get("choices", ()):
            found += choice["delta"].get("content") or ""
        if event.get("type") == "response.output_text.delta":
            found += event["delta"]
    return found
