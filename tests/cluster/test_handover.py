"""Answers of real vLLM go on at another replica as if nothing had happened.

One engine stands behind two link servers, so that a "replica" can be killed without a second start.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cluster.config import GeneratorConfig
from cluster.engines.base import Engine
from cluster.engines.factory import make_generator_engine
from cluster.models import store
from tests import asgi
from tests.cluster.test_vllm_adapters import make_adapter
from tests.cluster.tiny_llama import make_tiny_llama
from tests.serve.gateway_kit import World, gateway_world, metrics

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CHINESE = "Reply with emojis: \N{GRINNING FACE} and Chinese: 你好"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}
GRAMMAR = 'root ::= "a" rest\nrest ::= [a-z]+ "."'
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}


def chat(text: str = "Tell me a story of a fox.", **fields: Any) -> tuple[str, dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 40, "temperature": 0}
    return CHAT, body | fields


def complete(prompt: Any = "Once upon a time", **fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": prompt, "max_tokens": 30, "temperature": 0, **fields}


EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": chat(),
    "usage": chat(stream_options={"include_usage": True, "continuous_usage_stats": True}),
    "seed": chat(temperature=1.0, seed=7),
    "seed with top-p and top-k": chat(temperature=0.8, top_p=0.9, top_k=40, seed=7),
    "penalties": chat(frequency_penalty=0.7, presence_penalty=0.5, repetition_penalty=1.2),
    "min_tokens": chat(min_tokens=35),
    "logprobs": chat(logprobs=True, top_logprobs=3),
    "n": chat(temperature=1.0, seed=3, n=3),
    "multi-byte characters": chat(CHINESE),
    "JSON schema": chat(
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    ),
    "grammar": chat(structured_outputs={"grammar": GRAMMAR}),
    "tool": chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "find"}}),
    "prompts": complete(["Once upon a time", "The capital of France", "One two three"]),
    "prompts and n": complete(["Once upon a time", "One two"], n=2, seed=5, temperature=1.0),
    "echo": complete(echo=True, logprobs=2),
    "LoRA": complete(model="law"),
    "token ids": complete(return_token_ids=True),
    "responses": ("/v1/responses", {"input": "Tell me a story.", "max_output_tokens": 30}),
    "messages": ("/v1/messages", {"messages": chat()[1]["messages"], "max_tokens": 30}),
}
for _api in ("responses", "messages"):
    EXACT[_api][1]["temperature"] = 0

ATTEMPTS = 20
"""The tiny model ends an answer in less than a tenth of a second, during which this process may be
busy."""

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    model: Path = tmp_path_factory.mktemp("model")
    from transformers import AutoModelForCausalLM

    make_tiny_llama(model, store.resolve("smollm2-135m-instruct"))
    adapter = tmp_path_factory.mktemp("adapters") / "law"
    make_adapter(adapter, AutoModelForCausalLM.from_pretrained(model), seed=0)
    fields = {
        "name": "gen",
        "model": str(model),
        "adapters": {"law": str(adapter)},
        # In bfloat16, a prompt that includes the answer so far may change a token.
        "dtype": "float32",
        "kv_cache_memory_bytes": 64 * 1024**2,
    }
    engine = make_generator_engine(GeneratorConfig.model_validate(fields))
    await engine.start()
    yield engine
    await engine.stop()


async def answers(
    engine: Engine, path: str, body: dict[str, Any], num_chunks: int
) -> tuple[asgi.Answer, asgi.Answer]:
    """Return an answer whose replica was killed after some chunks, and an undisturbed one."""
    for _ in range(ATTEMPTS):
        if found := await interrupted(engine, path, body, num_chunks):
            return found
    raise AssertionError("each answer ended before its replica was killed")


async def interrupted(
    engine: Engine, path: str, body: dict[str, Any], num_chunks: int
) -> tuple[asgi.Answer, asgi.Answer] | None:
    """Return the same, or None if the answer ended before its replica was killed."""
    body = {"model": "gen", "stream": True, **body}
    headers = {"x-request-id": "r-1"}
    adapters = {"adapters": {"law": "law"}}
    async with gateway_world(routing="least-load", generator=adapters) as world:
        for name in ("gen-1", "gen-2"):
            await add_replica(world, engine, name)
        call = asgi.start(world.app, "POST", path, body, headers)
        await call.chunks(num_chunks)
        running = world.gateway.pools["gen"].replicas.running
        victim = next((each.info.id for each in running if each.in_flight), None)
        if victim is None:
            return None
        await world.kill(victim)
        answer = await call.done()
        assert answer.status == 200, answer.body
        await world.until_idle()
        found = await metrics(world)
        if not found.get(("tandem_stream_handovers_total", "gen", "continued", "lost")):
            return None
        tokens = found["tandem_completion_tokens_total", "gen"]
        prompt_tokens = found["tandem_prompt_tokens_total", "gen"]
        undisturbed = await asgi.start(world.app, "POST", path, body, headers).done()
        await world.until_idle()
        found = await metrics(world)
        assert found["tandem_prompt_tokens_total", "gen"] == 2 * prompt_tokens
        if body.get("temperature") == 0 or "seed" in body:
            assert found["tandem_completion_tokens_total", "gen"] == 2 * tokens
    return answer, undisturbed


async def add_replica(world: World, engine: Engine, name: str) -> None:
    await world.serve(engine.app, "gen", name, engine.routes(), resume_key=engine.resume_key)


EARLY = ("greedy", "n", "JSON schema", "tool", "responses", "messages")
"""Answers that are cut at their first chunk, too, which differs between the APIs."""
CUTS = [
    *((cell, 9) for cell in EXACT),
    *(pytest.param(cell, 1, marks=() if cell in EARLY else pytest.mark.long) for cell in EXACT),
]


@pytest.mark.parametrize(("cell", "num_chunks"), CUTS)
async def test_answers_are_identical(engine: Engine, cell: str, num_chunks: int) -> None:
    path, body = EXACT[cell]
    answer, undisturbed = await answers(engine, path, body, num_chunks)
    assert content(answer) == content(undisturbed)
    assert len(identities(answer)) == 1


async def test_an_answer_goes_on_up_to_its_stop_string(engine: Engine) -> None:
    path, body = chat()
    whole = "".join(content(await undisturbed_answer(engine, path, body))[0, "content"])
    stop = whole[80:84]
    answer, undisturbed = await answers(engine, path, body | {"stop": [stop]}, 5)
    assert content(answer) == content(undisturbed)
    assert content(answer)[0, "content"] == whole[: whole.index(stop)]


async def test_a_sampled_answer_continues(engine: Engine) -> None:
    fields: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True, "temperature": 1.0}
    answer, _ = await answers(engine, *chat(**fields), num_chunks=9)
    assert len(content(answer)[0, "token_ids"]) == 40
    assert len(identities(answer)) == 1


async def undisturbed_answer(engine: Engine, path: str, body: dict[str, Any]) -> asgi.Answer:
    return await asgi.post(engine.app, path, {"model": "gen", "stream": True, **body})


def identities(answer: asgi.Answer) -> set[Any]:
    """Return the ids and creation times in a stream; one for a single answer."""
    return {
        (event.get("id"), event.get("created"))
        for event in answer.data()
        if event.get("id") is not None
    } or {None}


def content(answer: asgi.Answer) -> dict[Any, Any]:
    """Return all that an answer says, independent of its division into events."""
    found: dict[Any, Any] = {}

    def add(key: Any, value: Any) -> None:
        if value:
            found[key] = found[key] + value if key in found else value

    for event in answer.data():
        assert "error" not in event, event
        for choice in event.get("choices", ()):
            index = choice["index"]
            delta = choice.get("delta") or choice
            for field in ("content", "text", "reasoning", "token_ids"):
                add((index, field), delta.get(field) or choice.get(field))
            for call in delta.get("tool_calls") or ():
                add((index, "tool"), call["function"].get("name"))
                add((index, "arguments"), call["function"].get("arguments"))
            for name, values in (choice.get("logprobs") or {}).items():
                add((index, f"logprobs {name}"), values)
            add((index, "end"), choice.get("finish_reason"))
        if not event.get("choices"):
            add("usage", list((event.get("usage") or {}).items()))
        delta = event.get("delta")
        text = delta.get("text") if isinstance(delta, dict) else delta
        add((event.get("type"), "text"), text if isinstance(text, str) else "")
    return found
