"""``Tandem``: generate, chat, stream, classify and embed from any Ray job, sync and async."""

import asyncio
import importlib
import threading
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar, overload
from weakref import WeakKeyDictionary

from cluster.client import wire
from cluster.client.results import Classification, Completion, Delta, Embedding
from cluster.client.transport import Answer, BackgroundLoop, Transport
from cluster.errors import LinkError, UnavailableError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

T = TypeVar("T")

MAX_CONCURRENT = 64
"""Requests of one call that are under way at a time; the rest of a long list waits here."""
TEXTS_PER_REQUEST = 1000
"""A longer list of texts is sent in parts of so many."""
PROMPTS_PER_REQUEST = 8
"""A longer list of prompts is sent in parts of so many, which may go to several replicas."""
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class _Call:
    """One request and what becomes of its answer."""

    path: str
    body: Mapping[str, Any] | None
    """None: a GET."""
    parse: Callable[[Mapping[str, Any]], list[Any]]


_MODELS = _Call("/v1/models", None, lambda answer: [card["id"] for card in answer["data"]])


class Tandem:
    """The running Tandem application, called from any job of its Ray cluster.

    May be used from several threads and event loops, and may be pickled. ``close`` ends its
    connections; so does the end of the process.

    Args:
        app: The Serve application's name.
        address: Passed to ``ray.init`` where this process has not connected to Ray yet.
    """

    def __init__(self, app: str = "tandem", *, address: str = "auto") -> None:
        self._app = app
        self._address = address
        self._lock = threading.Lock()
        self._transports: WeakKeyDictionary[asyncio.AbstractEventLoop, Transport] = (
            WeakKeyDictionary()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Tandem, self._app, address=self._address), ()

    @cached_property
    def _router(self) -> "DeploymentHandle":
        # Imported here, so that importing the client stays cheap.
        import_serve()
        import ray
        from ray import serve

        with _translated(self._app):
            if not ray.is_initialized():
                ray.init(address=self._address, logging_level="WARNING", log_to_driver=False)
            handle = serve.get_app_handle(self._app)
            # A cluster that is tuned for throughput tells its jobs to run handles in the caller's
            # own event loop, which a synchronous caller has none of.
            if not handle.is_initialized:  # Serve gives the same handle to all of a process
                handle._init(_run_router_in_separate_loop=True)
            return handle

    @cached_property
    def _background(self) -> BackgroundLoop:
        """Where the synchronous calls run."""
        background = BackgroundLoop()
        weakref.finalize(self, background.close)
        return background

    def close(self) -> None:
        """End the connections of the synchronous calls."""
        if "_background" in self.__dict__:
            self._background.close()
            del self.__dict__["_background"]

    async def aclose(self) -> None:
        """End the connections of this event loop."""
        transport = self._transports.pop(asyncio.get_running_loop(), None)
        if transport is not None:
            await transport.close()

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

    @overload
    async def agenerate(
        self, prompt: str, *, model: str | None = None, **sampling: Any
    ) -> Completion: ...
    @overload
    async def agenerate(
        self, prompt: Sequence[str], *, model: str | None = None, **sampling: Any
    ) -> list[Completion]: ...
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
        """Answer a conversation piece by piece, as the model makes it.

        Whoever reads slowly gets all that has come since in one piece after the other, at once.
        """
        batches = self._delta_batches(_stream_body(conversation, model, sampling))
        run = self._sync().run
        try:
            while (deltas := run(anext(batches, None))) is not None:
                yield from deltas
        finally:
            run(batches.aclose())

    async def astream(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> AsyncIterator[Delta]:
        """``stream``, as an async iterator."""
        async with aclosing(
            self._delta_batches(_stream_body(conversation, model, sampling))
        ) as batches:
            async for deltas in batches:
                for delta in deltas:
                    yield delta

    async def _delta_batches(self, body: bytes) -> AsyncGenerator[list[Delta], None]:
        reader = wire.DeltaReader()
        with _translated(self._app):
            head, answer = await self._transport().open("POST", CHAT, body)
            try:
                if head.status != 200:
                    chunks = [chunk async for chunk in _chunks(answer)]
                    raise wire.error_from(head.status, head.headers, b"".join(chunks))
                async for chunk in _chunks(answer):
                    yield list(reader.feed(chunk))
            finally:
                answer.cancel()

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

    @overload
    async def aclassify(self, text: str, **options: Any) -> Classification: ...
    @overload
    async def aclassify(self, text: Sequence[str], **options: Any) -> list[Classification]: ...
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

    @overload
    async def aembed(self, text: str, **options: Any) -> Embedding: ...
    @overload
    async def aembed(self, text: Sequence[str], **options: Any) -> list[Embedding]: ...
    async def aembed(
        self, text: str | Sequence[str], **options: Any
    ) -> Embedding | list[Embedding]:
        """``embed``, awaited."""
        calls = _text_calls("/v1/embeddings", text, options, wire.embeddings)
        return _unlist(text, await self._arun(calls))

    # -- models -------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """The names that ``model`` may have."""
        return self._run([_MODELS])

    async def amodels(self) -> list[str]:
        """``models``, awaited."""
        return await self._arun([_MODELS])

    # -- how ----------------------------------------------------------------------------------

    def _sync(self) -> BackgroundLoop:
        with self._lock:
            assert self._router is not None  # found in this thread, which may wait for Ray
            return self._background

    def _run(self, calls: Sequence[_Call]) -> list[Any]:
        return self._sync().run(self._arun(calls))

    async def _arun(self, calls: Sequence[_Call]) -> list[Any]:
        transport = self._transport()
        places = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(call: _Call) -> list[Any]:
            method, body = ("GET", b"") if call.body is None else ("POST", wire.encode(call.body))
            async with places:
                head, answer = await transport.ask(method, call.path, body)
            return call.parse(wire.decode(head.status, head.headers, answer))

        tasks = [asyncio.ensure_future(one(call)) for call in calls]
        try:
            with _translated(self._app):
                parts = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:  # nobody waits for these any more
                task.cancel()
            raise
        return [result for part in parts for result in part]

    def _transport(self) -> Transport:
        loop = asyncio.get_running_loop()
        transport = self._transports.get(loop)
        if transport is None:
            transport = self._transports[loop] = Transport(self._router)
        return transport


def import_serve() -> None:
    """Import Ray Serve, in a thread of its own.

    Ray cancels a task by interrupting its worker's main thread, and an import that is cut off
    there leaves a package without its modules, on which each later task of the worker fails.
    """
    thread = threading.Thread(target=importlib.import_module, args=("ray.serve",), daemon=True)
    thread.start()
    thread.join()


async def _chunks(answer: Answer) -> AsyncIterator[bytes]:
    while chunk := await answer.read():
        yield chunk


@contextmanager
def _translated(app: str) -> Iterator[None]:
    """Turn Ray's own errors into ours.

    Raises:
        UnavailableError: there is no cluster or no such application, or its router was lost.
    """
    try:
        yield
    except Exception as error:
        of_ray = type(error).__module__.partition(".")[0] == "ray"
        if not (of_ray or isinstance(error, LinkError | ConnectionError)):
            raise
        raise UnavailableError(
            f"The application {app!r} cannot be reached on this Ray cluster "
            f"(`tandem up` starts one): {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _generate_calls(
    prompt: str | Sequence[str], model: str | None, sampling: Mapping[str, Any]
) -> list[_Call]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    parts = [
        prompts[at : at + PROMPTS_PER_REQUEST] for at in range(0, len(prompts), PROMPTS_PER_REQUEST)
    ]
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
