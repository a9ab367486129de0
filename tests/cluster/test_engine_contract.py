"""Contract of all generator engines; the simulated one responds as vLLM does."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from itertools import groupby
from typing import Any

import pytest
import pytest_asyncio

from cluster.config import GeneratorConfig
from cluster.engines.base import Engine
from cluster.engines.factory import make_generator_engine
from cluster.engines.sim import SimEngine
from cluster.errors import ConfigError, EngineDeadError, RequestError
from cluster.link import LinkClient, LinkServer, RequestHead
from cluster.load import Load
from tests import asgi
from tests.cluster.engine_processes import engines_of_this_process

MODEL = "smollm2-135m-instruct"
CONTEXT = 1024
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "What is the capital of France?"}]
USAGE = {"include_usage": True}

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]


def config(engine: str, **fields: Any) -> GeneratorConfig:
    return GeneratorConfig.model_validate(
        {"name": "m", "model": MODEL, "engine": engine, "max_model_len": CONTEXT, **fields}
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real() -> AsyncIterator[Engine]:
    engine = make_generator_engine(config("vllm"))
    await engine.start()
    yield engine
    await engine.stop()
    assert engines_of_this_process() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sim() -> AsyncIterator[Engine]:
    engine = make_generator_engine(config("sim", sim={"decode_s_per_token": 0.002}))
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture(params=["sim", "vllm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    name = "real" if request.param == "vllm" else "sim"
    found: Engine = request.getfixturevalue(name)
    return found


def body(**fields: Any) -> dict[str, Any]:
    fields = {"model": "m", "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
    return fields if "prompt" in fields else {"messages": USER, **fields}


async def wait_until_idle(engine: Engine) -> None:
    async with asyncio.timeout(60):
        while engine.load() != Load(slots=engine.load().slots):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# --- equal shapes -----------------------------------------------------------------------------

EXACT = {"object", "type", "finish_reason", "role", "stop_reason", "status", "reason"}


def shape(value: Any, key: str = "") -> Any:
    """Return keys in order and types of values; of ``EXACT`` keys, the values themselves."""
    if isinstance(value, dict):
        return [(name, shape(inner, name)) for name, inner in value.items()]
    if isinstance(value, list):
        return [kind for kind, _ in groupby(shape(inner) for inner in value)]
    return value if key in EXACT else type(value).__name__


def stream_shape(answer: asgi.Answer) -> list[Any]:
    """Return the shapes of the events in order, without repetitions: vLLM may join tokens.

    With several prompts, each shape is listed once, because the order depends on the scheduler.
    """
    kinds = [
        (name, shape(data)) for (name, _), data in zip(answer.events(), answer.data(), strict=False)
    ]
    choices = [choice for data in answer.data() for choice in data.get("choices", ())]
    if len({choice["index"] for choice in choices}) > 1:
        return [kind for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    return [kind for kind, _ in groupby(kinds)]


SERVED = [
    (CHAT, body()),
    (CHAT, body(return_token_ids=True)),
    (CHAT, body(max_tokens=None, max_completion_tokens=3)),
    (CHAT, body(stream=True)),
    (CHAT, body(stream=True, stream_options=USAGE)),
    (CHAT, body(stream=True, stream_options={**USAGE, "continuous_usage_stats": True})),
    (CHAT, body(stream=True, return_token_ids=True)),
    (COMPLETION, body(prompt="Once upon a time")),
    (COMPLETION, body(prompt=["Once upon a time", "Far away"])),
    (COMPLETION, body(prompt=[5, 6, 7])),
    (COMPLETION, body(prompt=[[5, 6, 7], [8]], return_token_ids=True)),
    (COMPLETION, body(prompt="Once", stream=True)),
    (COMPLETION, body(prompt=[[5, 6], [7]], stream=True, stream_options=USAGE)),
    (
        COMPLETION,
        body(prompt="A", stream=True, stream_options={**USAGE, "continuous_usage_stats": True}),
    ),
    ("/tokenize", {"model": "m", "prompt": "Hi there"}),
    ("/tokenize", {"model": "m", "messages": USER, "return_token_strs": True}),
    ("/detokenize", {"model": "m", "tokens": [70, 71]}),
    ("/v1/responses", {"model": "m", "input": "Hi", "max_output_tokens": 3}),
    ("/v1/responses", {"model": "m", "input": "Hi", "max_output_tokens": 4, "stream": True}),
    ("/v1/messages", {"model": "m", "messages": USER, "max_tokens": 3}),
    ("/v1/messages", {"model": "m", "messages": USER, "max_tokens": 3, "stream": True}),
    ("/v1/messages/count_tokens", {"model": "m", "messages": USER}),
]


@pytest.mark.parametrize(("path", "request_body"), SERVED)
async def test_responses_have_equal_shapes(
    real: Engine, sim: Engine, path: str, request_body: dict[str, Any]
) -> None:
    real_answer, sim_answer = [await asgi.post(one.app, path, request_body) for one in (real, sim)]
    if request_body.get("stream"):
        for _ in range(5):  # if this process is busy, vLLM merges even the first and the last event
            if stream_shape(sim_answer) == stream_shape(real_answer):
                break
            real_answer = await asgi.post(real.app, path, request_body)
    assert real_answer.status == sim_answer.status == 200
    assert sim_answer.headers.keys() <= real_answer.headers.keys()
    assert sim_answer.headers["content-type"] == real_answer.headers["content-type"]
    if request_body.get("stream"):
        assert stream_shape(sim_answer) == stream_shape(real_answer)
        assert (sim_answer.events()[-1][1] == "[DONE]") == (real_answer.events()[-1][1] == "[DONE]")
    else:
        assert shape(sim_answer.json()) == shape(real_answer.json())


async def test_models_have_equal_shapes(real: Engine, sim: Engine) -> None:
    real_answer, sim_answer = [
        (await asgi.get(one.app, "/v1/models")).json() for one in (real, sim)
    ]
    for name in ("tool_call_parser", "reasoning_parser"):  # the simulated engine has none
        real_answer["data"][0].pop(name)
    assert shape(sim_answer) == shape(real_answer)
    assert sim_answer["data"][0]["id"] == real_answer["data"][0]["id"] == "m"
    assert (
        sim_answer["data"][0]["max_model_len"] == real_answer["data"][0]["max_model_len"] == CONTEXT
    )


REJECTED = [
    ("POST", CHAT, b'{"model": '),
    ("POST", COMPLETION, b"nonsense"),
    ("POST", CHAT, b"[1]"),
    ("POST", CHAT, b""),
    ("POST", CHAT, {"model": "m"}),
    ("POST", CHAT, {"model": "m", "messages": "x"}),
    ("POST", CHAT, {"model": "m", "messages": []}),
    ("POST", CHAT, body(max_tokens=0)),
    ("POST", CHAT, body(max_tokens=-1)),
    ("POST", CHAT, body(max_tokens="x")),
    ("POST", CHAT, body(max_tokens=1.5)),
    ("POST", CHAT, body(max_tokens=10**6)),
    ("POST", CHAT, body(max_completion_tokens=0)),
    ("POST", CHAT, body(max_completion_tokens=10**6)),
    ("POST", CHAT, body(model="other")),
    ("POST", CHAT, body(n=0)),
    ("POST", CHAT, body(temperature=-1)),
    ("POST", CHAT, body(temperature="x")),
    ("POST", CHAT, body(stop=5)),
    ("POST", CHAT, body(stop=[5])),
    ("POST", CHAT, body(stream="maybe")),
    ("POST", CHAT, body(stream_options=USAGE)),
    ("POST", CHAT, body(messages=[{"role": "user", "content": "hello " * 3000}])),
    ("POST", COMPLETION, body(prompt="hello " * 3000)),
    ("POST", COMPLETION, body(prompt="hello " * 3000, stream=True)),
    ("POST", COMPLETION, body(prompt=[5] * CONTEXT)),
    ("POST", COMPLETION, body(prompt=[5] * (CONTEXT + 1))),
    ("POST", COMPLETION, {"model": "m"}),
    ("POST", COMPLETION, body(prompt=[])),
    ("POST", COMPLETION, body(prompt="Hi", max_tokens=0)),
    ("POST", COMPLETION, body(prompt="Hi", max_tokens="x")),
    ("POST", COMPLETION, body(prompt="Hi", model="other")),
    ("POST", "/tokenize", {"model": "m"}),
    ("POST", "/detokenize", {"model": "m"}),
    ("POST", "/v1/responses", {"model": "m"}),
    ("POST", "/v1/responses", {"model": "other", "input": "x"}),
    ("POST", "/v1/messages", {"model": "m", "max_tokens": 3}),
    ("POST", "/v1/messages", {"model": "other", "messages": USER, "max_tokens": 3}),
    ("POST", "/v1/nothing", {}),
    ("GET", CHAT, None),
    ("GET", "/metrics", None),
    ("GET", "/health", None),
    ("POST", "/invocations", body()),
    ("POST", "/inference/v1/abort_requests", {"request_ids": ["1"]}),
    ("POST", "/scale_elastic_ep", {}),
]


def without_counts(answer: asgi.Answer) -> Any:
    """Return the body without numbers of fields: vLLM counts fields that it adds itself."""
    return json.loads(re.sub(rb"<dict of \d+ items>", b"<dict>", answer.body))


async def rejection(engine: Engine, method: str, path: str, body: Any) -> asgi.Answer:
    """Return an engine's answer; the link makes one of an error that the application raises."""
    try:
        return await asgi.call(engine.app, method, path, body)
    except RequestError as error:
        return asgi.Answer(error.status, chunks=[json.dumps(error.body()).encode()])


@pytest.mark.parametrize(("method", "path", "request_body"), REJECTED)
async def test_error_responses_are_equal(
    real: Engine, sim: Engine, method: str, path: str, request_body: Any
) -> None:
    real_answer, sim_answer = [
        await rejection(one, method, path, request_body) for one in (real, sim)
    ]
    assert sim_answer.status == real_answer.status >= 400
    assert without_counts(sim_answer) == without_counts(real_answer)
    assert sim_answer.headers.get("allow") == real_answer.headers.get("allow")


async def test_only_json_is_accepted(real: Engine, sim: Engine) -> None:
    header = {"content-type": "text/plain"}
    real_answer, sim_answer = [
        await asgi.post(e.app, CHAT, body(), headers=header) for e in (real, sim)
    ]
    assert (sim_answer.status, sim_answer.json()) == (real_answer.status, real_answer.json())


# --- equal behaviour -------------------------------------------------------------------------


async def test_a_stream_adds_up_to_the_whole_response(engine: Engine) -> None:
    whole = (await asgi.post(engine.app, CHAT, body(max_tokens=20))).json()
    streamed = await asgi.post(
        engine.app, CHAT, body(max_tokens=20, stream=True, stream_options=USAGE)
    )
    *chunks, last = streamed.data()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == whole["usage"][name]
    assert streamed.events()[-1][1] == "[DONE]"
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


async def test_the_id_of_a_response_is_the_one_that_the_router_sets(engine: Engine) -> None:
    fields = {"model": "m", "input": "Hi", "max_output_tokens": 3}
    raw = json.dumps({**fields, "request_id": "client"})[:-1] + ',"request_id":"resp_router"}'
    answer = await asgi.post(engine.app, "/v1/responses", raw.encode())
    assert answer.json()["id"] == "resp_router"
    streamed = await asgi.post(
        engine.app, "/v1/responses", {**fields, "request_id": "resp_router", "stream": True}
    )
    assert streamed.data()[0]["response"]["id"] == "resp_router"


async def test_token_counts_add_up(engine: Engine) -> None:
    answer = (await asgi.post(engine.app, CHAT, body(return_token_ids=True))).json()
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert usage["completion_tokens"] == len(answer["choices"][0]["token_ids"]) == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    counted = (await asgi.post(engine.app, "/tokenize", {"model": "m", "messages": USER})).json()
    assert counted["tokens"] == answer["prompt_token_ids"]
    assert counted["count"] == usage["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_is_reported_over_the_link(engine: Engine, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    server = LinkServer(engine.app, b"secret")
    link = LinkClient(*await server.start(), b"secret")
    try:
        await link.connect()
        payload = json.dumps(body(stream=stream, **options)).encode()
        head = RequestHead(
            method="POST", path=CHAT, headers=[(b"content-type", b"application/json")]
        )
        answer = link.open(head, payload)
        await answer.head()
        chunks = []
        while chunk := await answer.read():
            chunks.append(chunk)
    finally:
        await link.close()
        await server.stop()
    text = b"".join(chunks).decode()
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    usage = json.loads(events[-1] if stream else text)["usage"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == usage["prompt_tokens"] > 6
    assert answer.usage.completion_tokens == usage["completion_tokens"] == 6
    if not stream:  # otherwise the router measures them
        assert answer.usage.ttft_s is not None
        assert answer.usage.itl_s is not None


async def test_a_prompt_can_be_token_ids(engine: Engine) -> None:
    text = "Once upon a time"
    ids = (await asgi.post(engine.app, "/tokenize", {"model": "m", "prompt": text})).json()[
        "tokens"
    ]
    by_text = (await asgi.post(engine.app, COMPLETION, body(prompt=text))).json()
    by_ids = (await asgi.post(engine.app, COMPLETION, body(prompt=ids))).json()
    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"]
    back = (await asgi.post(engine.app, "/detokenize", {"model": "m", "tokens": ids})).json()
    assert back == {"prompt": text}


async def test_the_request_id_is_part_of_the_response_id(engine: Engine) -> None:
    header = {"x-request-id": "tandem-42"}
    for path, fields in ((CHAT, {}), (COMPLETION, {"prompt": "Hi"})):
        answer = await asgi.post(engine.app, path, body(**fields), headers=header)
        assert "tandem-42" in answer.json()["id"]
        assert answer.headers["x-request-id"] == "tandem-42"


async def test_text_ends_before_a_stop_string(engine: Engine) -> None:
    text = (await asgi.post(engine.app, CHAT, body())).json()["choices"][0]["message"]["content"]
    stop = text.split()[2]
    request_body = body(stop=[stop], stream_options=USAGE, stream=True)
    *chunks, last = (await asgi.post(engine.app, CHAT, request_body)).data()
    shown = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert shown == text[: text.index(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"][0]["stop_reason"] == stop
    assert last["usage"]["completion_tokens"] <= 6


async def test_the_context_limits_the_completion(engine: Engine) -> None:
    prompt = [70] * (CONTEXT - 9)
    answer = (await asgi.post(engine.app, COMPLETION, body(prompt=prompt, max_tokens=16))).json()
    assert answer["usage"]["total_tokens"] == CONTEXT
    messages = [{"role": "user", "content": "Hello " * 300}]
    request_body = {"model": "m", "messages": messages, "temperature": 0}
    answer = (await asgi.post(engine.app, CHAT, request_body)).json()
    ended = answer["choices"][0]["finish_reason"] == "stop"
    assert ended or answer["usage"]["total_tokens"] == CONTEXT


async def test_concurrent_requests_all_finish(engine: Engine) -> None:
    bodies = [body(prompt=f"Story number {i}:", max_tokens=8 + i, stream=True) for i in range(16)]
    for one in bodies:
        one["stream_options"] = USAGE
    answers = await asyncio.gather(*[asgi.post(engine.app, COMPLETION, one) for one in bodies])
    counts = [answer.data()[-1]["usage"]["completion_tokens"] for answer in answers]
    assert counts == [one["max_tokens"] for one in bodies]
    await wait_until_idle(engine)


async def test_the_load_tells_how_many_requests_can_run(engine: Engine) -> None:
    assert engine.load().slots in (128, 256)  # vLLM's default depends on the device


@pytest.mark.parametrize("how", ["cancel", "disconnect"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_the_engine(
    engine: Engine, how: str, stream: bool
) -> None:
    request_body = body(max_tokens=900, stream=stream)
    call = asgi.start(engine.app, "POST", CHAT, request_body)
    if stream:
        await call.chunks(5)
    async with asyncio.timeout(60):
        while engine.load().running != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    if how == "cancel":
        await call.cancel()
    else:
        call.disconnect()
    await wait_until_idle(engine)
    await engine.check_health()
    assert (await asgi.post(engine.app, CHAT, body())).status == 200


async def test_routes_lists_the_paths_that_are_served(engine: Engine) -> None:
    routes = engine.routes()
    assert {"/v1/models", CHAT, COMPLETION, "/tokenize", "/v1/messages"} <= set(routes)
    assert not {"/metrics", "/health", "/inference/v1/abort_requests", "/docs"} & set(routes)
    assert len(routes) == len(set(routes))
    document = (await asgi.get(engine.app, "/openapi.json")).json()
    assert {CHAT, COMPLETION} <= set(document["paths"]) <= set(routes)


# --- failures; test_a_killed_vllm_process comes last because it ends the shared engine -----

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
DEAD_BODY = {"error": {"message": DEAD, "type": "InternalServerError", "param": None, "code": 500}}


async def check_dead_engine(engine: Engine, stream: asgi.Call, whole: asgi.Call) -> None:
    streamed, answered = await stream.done(), await whole.done()
    assert streamed.status == 200
    assert streamed.events()[-1][1] == "[DONE]"
    assert streamed.data()[-1] == DEAD_BODY
    assert (answered.status, answered.json()) == (500, DEAD_BODY)
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    after = await asgi.post(engine.app, CHAT, body(stream=True))
    assert (after.status, after.json()) == (500, DEAD_BODY)


async def test_a_simulated_engine_dies() -> None:
    sim = {"die_after_requests": 3, "decode_s_per_token": 0.01}
    engine = make_generator_engine(config("sim", sim=sim))
    await engine.start()
    stream = asgi.start(engine.app, "POST", CHAT, body(max_tokens=900, stream=True))
    whole = asgi.start(engine.app, "POST", CHAT, body(max_tokens=900))
    await stream.chunks(3)
    await engine.check_health()
    await asgi.post(engine.app, CHAT, body())
    await check_dead_engine(engine, stream, whole)
    await engine.stop()


async def test_simulated_failures_and_hangs() -> None:
    engine = make_generator_engine(config("sim", sim={"fail_rate": 1, "hang_after_requests": 1}))
    await engine.start()
    failed = await asgi.post(engine.app, CHAT, body())
    assert failed.status == 500
    assert failed.json()["error"]["type"] == "InternalServerError"
    hung = asgi.start(engine.app, "POST", CHAT, body())
    async with asyncio.timeout(60):
        while engine.load().running != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    with pytest.raises(TimeoutError):
        await hung.done(0.1)
    assert engine.load().running == 1
    await hung.cancel()
    assert engine.load() == Load(slots=256)
    await engine.stop()

    with pytest.raises(EngineDeadError):
        await SimEngine(config("sim", sim={"fail_startup": True})).start()
    with pytest.raises(ConfigError, match="max_model_len"):
        await SimEngine(config("sim", sim={"num_kv_blocks": 2})).start()


async def test_wrong_arguments_are_reported_by_name() -> None:
    engine = make_generator_engine(config("vllm", engine_args={"max_num_seq": 3}))
    with pytest.raises(ConfigError, match="max_num_seqs"):
        await engine.start()
    engine = make_generator_engine(config("vllm", max_model_len=10**6))
    with pytest.raises(ConfigError, match="max_model_len"):
        await engine.start()
    with pytest.raises(EngineDeadError):
        await engine.check_health()


async def test_a_killed_vllm_process(real: Engine) -> None:
    stream = asgi.start(real.app, "POST", CHAT, body(max_tokens=900, stream=True))
    whole = asgi.start(real.app, "POST", CHAT, body(max_tokens=900))
    await stream.chunks(3)
    (process,) = engines_of_this_process()
    process.kill()
    await check_dead_engine(real, stream, whole)
