"""``Tandem``: generate, chat, stream, classify and embed from any Ray job, sync and async."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar, overload

from cluster.client import wire
from cluster.client.calls import MODELS, Call, chat_call, generate_calls, stream_body, text_calls
from cluster.client.results import (
    Candidate,
    Classification,
    Completion,
    Delta,
    Embedding,
    Entity,
    Ranked,
)
from cluster.client.session import Session

T = TypeVar("T")


class Tandem:
    """The running Tandem application, called from any job of its Ray cluster.

    May be used from several threads and event loops, and may be pickled. ``close`` ends its
    connections; so does the end of the process.

    Args:
        app: The Serve application's name.
        address: Passed to ``ray.init`` where this process has not connected to Ray yet.
    """

    def __init__(self, app: str = "tandem", *, address: str = "auto") -> None:
        self._session = Session(app, address)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Tandem, self._session.app, address=self._session.address), ()

    def close(self) -> None:
        """End the connections of the synchronous calls."""
        self._session.close()

    async def aclose(self) -> None:
        """End the connections of this event loop."""
        await self._session.aclose()

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
        return _unlist(prompt, self._run(generate_calls(prompt, model, sampling)))

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
        return _unlist(prompt, await self._session.run(generate_calls(prompt, model, sampling)))

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
        return self._run([chat_call(one, model, sampling) for one in conversations])

    async def achats(
        self,
        conversations: Sequence[wire.Conversation],
        *,
        model: str | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """``chats``, awaited."""
        return await self._session.run([chat_call(one, model, sampling) for one in conversations])

    # -- stream -------------------------------------------------------------------------------

    def stream(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> Iterator[Delta]:
        """Answer a conversation piece by piece, as the model makes it.

        Whoever reads slowly gets all that has come since in one piece after the other, at once.
        """
        batches = self._session.delta_batches(stream_body(conversation, model, sampling))
        wait_for = self._session.wait_for
        try:
            while (deltas := wait_for(_next(batches))) is not None:
                yield from deltas
        finally:
            wait_for(batches.aclose())

    async def astream(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> AsyncIterator[Delta]:
        """``stream``, as an async iterator."""
        body = stream_body(conversation, model, sampling)
        async with aclosing(self._session.delta_batches(body)) as batches:
            async for deltas in batches:
                for delta in deltas:
                    yield delta

    # -- classify and embed -------------------------------------------------------------------

    @overload
    def classify(self, text: str, **options: Any) -> Classification: ...
    @overload
    def classify(self, text: Sequence[str], **options: Any) -> list[Classification]: ...
    def classify(
        self, text: str | Sequence[str], **options: Any
    ) -> Classification | list[Classification]:
        """Label a text, or each of a list; options: ``model``, ``top_k``, ``truncate``."""
        calls = text_calls("/classify", text, options, wire.classifications)
        return _unlist(text, self._run(calls))

    @overload
    async def aclassify(self, text: str, **options: Any) -> Classification: ...
    @overload
    async def aclassify(self, text: Sequence[str], **options: Any) -> list[Classification]: ...
    async def aclassify(
        self, text: str | Sequence[str], **options: Any
    ) -> Classification | list[Classification]:
        """``classify``, awaited."""
        calls = text_calls("/classify", text, options, wire.classifications)
        return _unlist(text, await self._session.run(calls))

    @overload
    def embed(self, text: str, **options: Any) -> Embedding: ...
    @overload
    def embed(self, text: Sequence[str], **options: Any) -> list[Embedding]: ...
    def embed(self, text: str | Sequence[str], **options: Any) -> Embedding | list[Embedding]:
        """Embed a text, or each of a list; options: ``model``, ``dimensions``."""
        calls = text_calls("/v1/embeddings", text, options, wire.embeddings)
        return _unlist(text, self._run(calls))

    @overload
    async def aembed(self, text: str, **options: Any) -> Embedding: ...
    @overload
    async def aembed(self, text: Sequence[str], **options: Any) -> list[Embedding]: ...
    async def aembed(
        self, text: str | Sequence[str], **options: Any
    ) -> Embedding | list[Embedding]:
        """``embed``, awaited."""
        calls = text_calls("/v1/embeddings", text, options, wire.embeddings)
        return _unlist(text, await self._session.run(calls))

    # -- what other encoders do ---------------------------------------------------------------

    def entities(self, texts: Sequence[str], **options: Any) -> list[list[Entity]]:
        """The entities of each text; options: ``model``, ``aggregation_strategy``, ``stride``."""
        return self._run(text_calls("/token-classification", texts, options, wire.entities))

    async def aentities(self, texts: Sequence[str], **options: Any) -> list[list[Entity]]:
        """``entities``, awaited."""
        calls = text_calls("/token-classification", texts, options, wire.entities)
        return await self._session.run(calls)

    def fill_mask(self, texts: Sequence[str], **options: Any) -> list[list[list[Candidate]]]:
        """Candidates for each mask of each text; options: ``model``, ``top_k``."""
        return self._run(text_calls("/fill-mask", texts, options, wire.candidates))

    async def afill_mask(self, texts: Sequence[str], **options: Any) -> list[list[list[Candidate]]]:
        """``fill_mask``, awaited."""
        return await self._session.run(text_calls("/fill-mask", texts, options, wire.candidates))

    def score(self, text: str, others: Sequence[str], **options: Any) -> list[float]:
        """How well ``text`` goes with each of ``others``."""
        body = {"text_1": text, "text_2": list(others), **options}
        return self._run([Call("/score", body, wire.scores)])

    async def ascore(self, text: str, others: Sequence[str], **options: Any) -> list[float]:
        """``score``, awaited."""
        body = {"text_1": text, "text_2": list(others), **options}
        return await self._session.run([Call("/score", body, wire.scores)])

    def rerank(self, query: str, documents: Sequence[str], **options: Any) -> list[Ranked]:
        """The documents by their relevance to ``query``, the best first; options: ``top_n``."""
        body = {"query": query, "documents": list(documents), **options}
        return self._run([Call("/rerank", body, wire.rankings)])

    async def arerank(self, query: str, documents: Sequence[str], **options: Any) -> list[Ranked]:
        """``rerank``, awaited."""
        body = {"query": query, "documents": list(documents), **options}
        return await self._session.run([Call("/rerank", body, wire.rankings)])

    # -- models -------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """The names that ``model`` may have."""
        return self._run([MODELS])

    async def amodels(self) -> list[str]:
        """``models``, awaited."""
        return await self._session.run([MODELS])

    def _run(self, calls: Sequence[Call]) -> list[Any]:
        return self._session.wait_for(self._session.run(calls))


async def _next(batches: AsyncGenerator[list[Delta], None]) -> list[Delta] | None:
    return await anext(batches, None)


def _unlist(given: str | Sequence[str], results: list[T]) -> T | list[T]:
    return results[0] if isinstance(given, str) else results
