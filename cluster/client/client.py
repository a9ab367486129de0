"""``Tandem``: generate, chat, stream, classify and embed from any Ray job, sync and async."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, overload

from cluster.client import wire
from cluster.client.results import Classification, Completion, Delta, Embedding
from cluster.errors import UnavailableError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse

T = TypeVar("T")

MAX_CONCURRENT = 64
"""Requests of one call that are under way at a time; the rest of a long list waits here."""
TEXTS_PER_REQUEST = 1000
"""A longer list is sent in parts of so many."""
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class _Call:
    """One request and what becomes of its answer."""

    path: str
    body: Mapping[str, Any]
    parse: Callable[[Mapping[str, Any]], list[Any]]


class Tandem:
    """The running Tandem application, called through Ray.

    Args:
        app: The Serve application's name.
        address: Passed to ``ray.init`` where this process has not connected to Ray yet.
    """

    def __init__(self, app: str = "tandem", *, address: str = "auto") -> None:
        self._app = app
        self._address = address

    @cached_property
    def _router(self) -> "DeploymentHandle":
        # Imported here, so that importing the client stays cheap.
        import ray
        from ray import serve
        from ray.serve.exceptions import RayServeException

        if not ray.is_initialized():
            ray.init(address=self._address, logging_level="WARNING", log_to_driver=False)
        try:
            return serve.get_app_handle(self._app)
        except RayServeException as error:
            raise UnavailableError(
                f"No application {self._app!r} runs on this Ray cluster; `tandem up` starts one."
            ) from error

    # -- generate -----------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str, *, model: str | None = None, **sampling: Any) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[str], *, model: str | None = None, **sampling: Any
    ) -> list[Completion]: ...
    def generate(
        self, prompt: str | Sequence[str], *, model: str | None = None, **sampling: Any
    ) -> Completion | list[Completion]:
        """Continue a text, or each of a list; ``sampling`` is what ``/v1/completions`` takes."""
        return _unlist(prompt, self._run(_generate_calls(prompt, model, sampling)))

    async def agenerate(
        self, prompt: str | Sequence[str], *, model: str | None = None, **sampling: Any
    ) -> Completion | list[Completion]:
        """``generate``, awaited."""
        return _unlist(prompt, await self._arun(_generate_calls(prompt, model, sampling)))

    # -- chat ---------------------------------------------------------------------------------

    def chat(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> Completion:
        """Answer a conversation: a text, or messages with role and content."""
        return self.chats([conversation], model=model, **sampling)[0]

    async def achat(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> Completion:
        """``chat``, awaited."""
        return (await self.achats([conversation], model=model, **sampling))[0]

    def chats(
        self,
        conversations: Sequence[wire.Conversation],
        *,
        model: str | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Answer each of many conversations, in order."""
        return self._run([_chat_call(one, model, sampling) for one in conversations])

    async def achats(
        self,
        conversations: Sequence[wire.Conversation],
        *,
        model: str | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """``chats``, awaited."""
        return await self._arun([_chat_call(one, model, sampling) for one in conversations])

    # -- stream -------------------------------------------------------------------------------

    def stream(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> Iterator[Delta]:
        """Answer a conversation piece by piece, as the model makes it."""
        reader = wire.DeltaReader()
        body = _stream_body(conversation, model, sampling)
        response = self._router.options(stream=True).call.remote("POST", CHAT, body)
        try:
            chunks = iter(response)
            status, headers = next(chunks)
            if status != 200:
                raise wire.error_from(status, headers, b"".join(chunks))
            for chunk in chunks:
                yield from reader.feed(chunk)
        finally:
            response.cancel()

    async def astream(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> AsyncIterator[Delta]:
        """``stream``, as an async iterator."""
        reader = wire.DeltaReader()
        body = _stream_body(conversation, model, sampling)
        response = self._router.options(stream=True).call.remote("POST", CHAT, body)
        try:
            status, headers = await anext(response)
            if status != 200:
                raise wire.error_from(status, headers, b"".join([c async for c in response]))
            async for chunk in response:
                for delta in reader.feed(chunk):
                    yield delta
        finally:
            response.cancel()

    # -- classify and embed -------------------------------------------------------------------

    @overload
    def classify(self, text: str, **options: Any) -> Classification: ...
    @overload
    def classify(self, text: Sequence[str], **options: Any) -> list[Classification]: ...
    def classify(
        self, text: str | Sequence[str], **options: Any
    ) -> Classification | list[Classification]:
        """Label a text, or each of a list; options: ``model``, ``top_k``, ``truncate``."""
        calls = _text_calls("/classify", text, options, wire.classifications)
        return _unlist(text, self._run(calls))

    async def aclassify(
        self, text: str | Sequence[str], **options: Any
    ) -> Classification | list[Classification]:
        """``classify``, awaited."""
        calls = _text_calls("/classify", text, options, wire.classifications)
        return _unlist(text, await self._arun(calls))

    @overload
    def embed(self, text: str, **options: Any) -> Embedding: ...
    @overload
    def embed(self, text: Sequence[str], **options: Any) -> list[Embedding]: ...
    def embed(self, text: str | Sequence[str], **options: Any) -> Embedding | list[Embedding]:
        """Embed a text, or each of a list; options: ``model``, ``dimensions``."""
        calls = _text_calls("/v1/embeddings", text, options, wire.embeddings)
        return _unlist(text, self._run(calls))

    async def aembed(
        self, text: str | Sequence[str], **options: Any
    ) -> Embedding | list[Embedding]:
        """``embed``, awaited."""
        calls = _text_calls("/v1/embeddings", text, options, wire.embeddings)
        return _unlist(text, await self._arun(calls))

    # -- models -------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """The names that ``model`` may have."""
        answer = wire.decode(*self._router.ask.remote("GET", "/v1/models", b"").result())
        return [card["id"] for card in answer["data"]]

    # -- how ----------------------------------------------------------------------------------

    def _run(self, calls: Sequence[_Call]) -> list[Any]:
        results: list[Any] = []
        under_way: deque[tuple[_Call, DeploymentResponse]] = deque()
        for call in calls:
            if len(under_way) == MAX_CONCURRENT:
                results += _result(*under_way.popleft())
            under_way.append((call, self._send(call)))
        while under_way:
            results += _result(*under_way.popleft())
        return results

    async def _arun(self, calls: Sequence[_Call]) -> list[Any]:
        places = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(call: _Call) -> list[Any]:
            async with places:
                return call.parse(wire.decode(*await self._send(call)))

        tasks = [asyncio.ensure_future(one(call)) for call in calls]
        try:
            parts = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        return [result for part in parts for result in part]

    def _send(self, call: _Call) -> "DeploymentResponse":
        return self._router.ask.remote("POST", call.path, wire.encode(call.body))


def _result(call: _Call, response: "DeploymentResponse") -> list[Any]:
    return call.parse(wire.decode(*response.result()))


def _generate_calls(
    prompt: str | Sequence[str], model: str | None, sampling: Mapping[str, Any]
) -> list[_Call]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    parts = [prompts[at : at + MAX_CONCURRENT] for at in range(0, len(prompts), MAX_CONCURRENT)]
    return [
        _Call("/v1/completions", {"model": model, "prompt": part, **sampling}, wire.completions)
        for part in parts
    ]


def _chat_call(
    conversation: wire.Conversation, model: str | None, sampling: Mapping[str, Any]
) -> _Call:
    body = {"model": model, "messages": wire.messages(conversation), **sampling}
    return _Call(CHAT, body, wire.completions)


def _stream_body(
    conversation: wire.Conversation, model: str | None, sampling: Mapping[str, Any]
) -> bytes:
    body = {"model": model, "messages": wire.messages(conversation), **sampling}
    return wire.encode({**body, "stream": True, "stream_options": {"include_usage": True}})


def _text_calls(
    path: str,
    text: str | Sequence[str],
    options: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], list[Any]],
) -> list[_Call]:
    texts = [text] if isinstance(text, str) else list(text)
    parts = [texts[at : at + TEXTS_PER_REQUEST] for at in range(0, len(texts), TEXTS_PER_REQUEST)]
    return [_Call(path, {"input": part, **options}, parse) for part in parts]


def _unlist(given: str | Sequence[str], results: list[T]) -> T | list[T]:
    return results[0] if isinstance(given, str) else results
