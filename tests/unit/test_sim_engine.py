"""The simulated engine over ASGI: chunks, limits, disconnects and shutdown."""

import asyncio
import gc
import json

import pytest

from cluster.asgi import USAGE, Message
from cluster.config import GeneratorConfig
from cluster.engines.sim import SimEngine
from cluster.errors import EngineDeadError
from cluster.load import Load
from cluster.usage import UsageCounter
from tests import asgi

CHAT = "/v1/chat/completions"
JSON = [(b"content-type", b"application/json")]
USER = [{"role": "user", "content": "Hi"}]


async def start_engine(**sim: float | int) -> SimEngine:
    config = {"name": "m", "model": "none", "engine": "sim", "sim": sim}
    engine = SimEngine(GeneratorConfig.model_validate(config))
    await engine.start()
    return engine


async def test_every_token_is_a_separate_chunk() -> None:
    engine = await start_engine()
    body = {"messages": USER, "max_tokens": 40, "stream": True}
    answers = await asyncio.gather(*[asgi.post(engine.app, CHAT, body) for _ in range(20)])
    for answer in answers:
        assert len(answer.chunks) == 1 + 40 + 1  # the role, the tokens, [DONE]
        assert answer.events()[-1][1] == "[DONE]"
    texts = {"".join(c["choices"][0]["delta"]["content"] for c in a.data()) for a in answers}
    assert len(texts) == 1
    assert engine.load() == Load(slots=256)
    await engine.stop()


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
async def test_a_client_that_goes_away_frees_its_blocks(how: str) -> None:
    engine = await start_engine(decode_s_per_token=3600)
    call = asgi.start(engine.app, "POST", CHAT, {"messages": USER, "stream": True})
    await call.chunks(2)
    assert engine.load().running == 1
    assert engine.load().kv_cache_usage > 0
    if how == "cancel":
        await call.cancel()
    else:
        call.disconnect()
        await call.done()
    assert engine.load() == Load(slots=256)
    await engine.stop()


async def test_max_num_seqs_limits_the_running_requests() -> None:
    engine = await start_engine(decode_s_per_token=3600, max_num_seqs=2)
    calls = [asgi.start(engine.app, "POST", CHAT, {"messages": USER}) for _ in range(5)]
    while not engine.load().running:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert (engine.load().running, engine.load().waiting) == (2, 3)
    for call in calls:
        await call.cancel()
    await engine.stop()


async def test_stopping_fails_running_requests() -> None:
    engine = await start_engine(decode_s_per_token=3600)
    call = asgi.start(engine.app, "POST", CHAT, {"messages": USER})
    while not engine.load().running:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await engine.stop()
    await engine.stop()
    assert (await call.done()).status == 500


async def test_usage_has_the_token_times() -> None:
    engine = await start_engine(prefill_s_per_token=0.05, decode_s_per_token=0.02)
    usage = UsageCounter()
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": JSON}
    payload = json.dumps({"messages": USER, "max_tokens": 4}).encode()
    call = asgi.Call(engine.app, {**scope, "extensions": {USAGE: usage}}, payload)
    await call.done()
    reported = usage.report()
    assert reported is not None
    assert reported.ttft_s is not None
    assert reported.itl_s is not None
    # The prompt has at least four tokens. A step may make up for 0.05 s of lag.
    assert reported.ttft_s > 0.1
    assert 0 < reported.itl_s < 2
    await engine.stop()


@pytest.mark.parametrize("how", ["cancel", "disconnect", "failure"])
async def test_a_client_that_goes_away_leaves_no_exception_behind(
    caplog: pytest.LogCaptureFixture, how: str
) -> None:
    engine = await start_engine()
    body = json.dumps({"messages": USER, "stream": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sending, leaves = asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await leaves.wait()
        if how == "failure":
            raise ConnectionError("the connection is gone")
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sending.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ConnectionError("the client is gone")

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": JSON}
    task = asyncio.ensure_future(engine.app(scope, receive, send))
    await sending.wait()
    if how == "cancel":
        task.cancel()
    leaves.set()
    await asyncio.gather(task, return_exceptions=True)
    del task
    await asyncio.sleep(0)
    gc.collect()
    assert "never retrieved" not in caplog.text
    await engine.stop()


async def test_a_hung_engine_is_unhealthy() -> None:
    values = {"name": "m", "model": "none", "engine": "sim", "stall_timeout_s": 0.1}
    engine = SimEngine(
        GeneratorConfig.model_validate({**values, "sim": {"hang_after_requests": 1}})
    )
    await engine.start()
    assert (await asgi.post(engine.app, CHAT, {"messages": USER})).status == 200
    await asyncio.sleep(0.2)
    await engine.check_health()  # idle
    hung = asgi.start(engine.app, "POST", CHAT, {"messages": USER})
    with pytest.raises(EngineDeadError, match="no progress"):
        await asgi.check_health_repeatedly(engine)
    await hung.cancel()
    await engine.stop()
