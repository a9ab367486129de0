"""Typed tasks in this process: router, scripted models and applications, over real links."""

import asyncio
import base64
import json
import math
import re
import tempfile
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.applications.engine import TaskEngine
from cluster.asgi import Receive, Scope, Send, read_body, usage_of
from cluster.client.session import Session
from cluster.config import parse
from cluster.config.applications import APPLICATION_PATHS
from cluster.errors import OverloadedError
from cluster.gateway import Gateway, GatewayApp, Wiring
from cluster.key_file import KeyFile
from cluster.link import LinkServer
from tests import asgi
from tests.serve.gateway_kit import SECRET, World
from tests.serve.link_kit import SECRET as CLIENT_SECRET
from tests.serve.test_client_transport import FakeHandle

CONTEXT_TOKENS = 600
CLASSIFIER_TASKS = ("classify", "embed", "rerank")
TOKEN_CHARS = 4
"""A token of the scripted generator is four characters, rounded up."""

Script = Callable[[list[dict[str, str]]], str]
"""Returns the answer to a conversation."""


def num_tokens(text: str) -> int:
    return math.ceil(len(text) / TOKEN_CHARS)


@dataclass
class ScriptedGenerator:
    """vLLM's API with answers from a function, words as pieces of streams, and real counts."""

    script: Script = lambda messages: "ok"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    running: int = 0
    peak: int = 0
    gate: asyncio.Event | None = None
    fails_at: int | None = None
    """Number of the call, from 0, that fails."""
    label_logprobs: Callable[[list[dict[str, str]]], float] = lambda messages: 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads(await read_body(receive) or b"{}")
        if scope["path"] == "/tokenize":
            text = body.get("prompt")
            if text is None:
                text = "".join(message["content"] for message in body["messages"])
            reply = {"count": num_tokens(text), "max_model_len": CONTEXT_TOKENS, "tokens": []}
            await _send_json(send, reply)
            return
        self.bodies.append(body)
        self.scopes.append(scope)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(0.002)
            if self.gate is not None:
                await self.gate.wait()
            if self.fails_at == len(self.bodies) - 1:
                raise RuntimeError("scripted failure")
            await self._chat(scope, body, send)
        finally:
            self.running -= 1

    async def _chat(self, scope: Scope, body: dict[str, Any], send: Send) -> None:
        messages = body["messages"]
        text = self.script(messages)
        counter = usage_of(scope)
        counter.prompt_tokens = num_tokens("".join(m["content"] for m in messages))
        counter.completion_tokens = num_tokens(text)
        usage = {
            "prompt_tokens": counter.prompt_tokens,
            "completion_tokens": counter.completion_tokens,
        }
        if body.get("stream"):
            await _send_stream(send, text, usage)
            return
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        reply: dict[str, Any] = {"id": "c", "model": "gen", "choices": [choice], "usage": usage}
        if body.get("prompt_logprobs") is not None:
            logprob = self.label_logprobs(messages)
            reply["prompt_logprobs"] = [None, {"1": {"logprob": logprob}}]
        await _send_json(send, reply)


async def scripted_classifier(scope: Scope, receive: Receive, send: Send) -> None:
    """Find a text positive if it has the word `good`; embed it by three letters."""
    body = json.loads(await read_body(receive) or b"{}")
    if scope["path"] == "/tokenize" and "inputs" not in body:
        reply = {"count": num_tokens(str(body)), "max_model_len": CONTEXT_TOKENS, "tokens": []}
        await _send_json(send, reply)
        return
    if scope["path"] == "/tokenize":
        words = re.finditer(r"\w+|[^\w\s]", body["inputs"])
        await _send_json(send, [[{"start": w.start(), "stop": w.end()} for w in words]])
        return
    if scope["path"] == "/rerank":
        if "no reranker" in body["query"]:
            raise RuntimeError("scripted failure")
        if "busy reranker" in body["query"]:
            raise OverloadedError("scripted overload", retry_after_s=1)
        found = [{"index": index} for index, _ in enumerate(body["documents"])]
        await _send_json(send, {"results": found[::-1], "usage": {"prompt_tokens": 1}})
        return
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    tokens = sum(map(num_tokens, texts))
    usage_of(scope).prompt_tokens = tokens
    rows: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        if scope["path"] == "/v1/embeddings":
            vector = [float(text.count(letter)) for letter in "abc"]
            norm = math.hypot(*vector) or 1.0
            row = [value / norm for value in vector]
            is_base64 = body.get("encoding_format") == "base64"
            encoded = base64.b64encode(array("f", row).tobytes()).decode()
            rows.append({"index": index, "embedding": encoded if is_base64 else row})
            continue
        best, other = ("positive", "negative") if "good" in text else ("negative", "positive")
        scores = [{"label": best, "score": 0.9}, {"label": other, "score": 0.1}]
        rows.append({"index": index, "label": best, "score": 0.9, "scores": scores})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    await _send_json(send, {"data": rows, "usage": usage, "model": "cls"})


async def _send_json(send: Send, body: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


async def _send_stream(send: Send, text: str, usage: dict[str, int]) -> None:
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    words = text.split(" ")
    deltas = [word + " " * (index < len(words) - 1) for index, word in enumerate(words)]
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": delta}, "finish_reason": None}]}
        for delta in deltas
    ]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    events.append({"choices": [], "usage": usage})
    for event in events:
        content = b"data: " + json.dumps(event).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": content, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


@dataclass
class TaskWorld:
    """A router with scripted models and the applications."""

    world: World
    generator: ScriptedGenerator
    engine: TaskEngine
    session: Session

    async def post(self, task: str, key: str | None = None, **body: Any) -> asgi.Answer:
        headers = {"x-api-key": key} if key else {}
        return await asgi.post(self.world.app, f"/v1/tasks/{task}", body, headers=headers)

    async def result(self, task: str, **body: Any) -> dict[str, Any]:
        answer = await self.post(task, **body)
        assert answer.status == 200, answer.body
        result: dict[str, Any] = json.loads(answer.body)
        return result

    async def events(self, task: str, **body: Any) -> list[Any]:
        answer = await self.post(task, stream=True, **body)
        assert answer.status == 200, answer.body
        lines = [line for line in answer.body.decode().split("\n\n") if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@asynccontextmanager
async def task_world(
    script: Script | None = None,
    key_file: KeyFile | None = None,
    args: dict[str, Any] | None = None,
    **applications: Any,
) -> AsyncIterator[TaskWorld]:
    config = parse(
        {
            "generators": [{"name": "gen", "model": "m"}],
            "classifiers": [{"name": "cls", "model": "m", "tasks": CLASSIFIER_TASKS}],
            "applications": applications,
            **(args or {}),
        }
    )
    assert config.applications is not None
    wirings = {name: Wiring(SECRET) for name, _ in config.served_pools}
    gateway = Gateway(config, wirings, versions={"tandem": "0"}, key_file=key_file)
    world = World(gateway, config)
    inner = LinkServer(GatewayApp(gateway, authenticates=False), CLIENT_SECRET)
    session = Session("tandem", "auto")
    handle = FakeHandle(GatewayApp(gateway, authenticates=False), [await inner.start()])
    session.__dict__["_router"] = handle
    directory = tempfile.TemporaryDirectory(prefix="tandem-knowledge-")
    applications_config = config.with_default_models(config.applications)
    engine = TaskEngine(applications_config, session, Path(directory.name))
    await engine.start()
    generator = ScriptedGenerator(script or (lambda messages: "ok"))
    routes = ("/v1/chat/completions", "/tokenize")
    await world.serve(generator, "gen", "gen-1", routes)
    await world.serve(
        scripted_classifier, "cls", "cls-1", ("/classify", "/v1/embeddings", "/tokenize", "/rerank")
    )
    await world.serve(engine.app, "applications", "app-1", APPLICATION_PATHS)
    try:
        yield TaskWorld(world, generator, engine, session)
    finally:
        await engine.stop()
        directory.cleanup()
        await inner.stop()
        await gateway.close()
        for server in world.servers.values():
            await server.stop()
