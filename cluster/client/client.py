"""``Tandem``: generate, chat, stream, classify and embed from any Ray job; sync and async."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar, overload

from cluster.client import wire
from cluster.client.knowledge import KnowledgeBase, list_bases
from cluster.client.results import (
    BatchState,
    Candidate,
    Classification,
    Completion,
    Delta,
    Embedding,
    Entity,
    Ranked,
)
from cluster.client.session import Session
from cluster.client.speech import SpeechMethods
from cluster.client.tasks import TaskMethods
from cluster.errors import InvalidRequestError
from cluster.tasks.knowledge import Knowledge

T = TypeVar("T")


class Tandem(TaskMethods, SpeechMethods):
    """The running Tandem application, called from any job of its Ray cluster.

    Every method has an async form: ``achat`` of ``chat``, and so on.

    An instance may be shared by threads and event loops and may be pickled. ``close`` is optional:
    the connections also end with the process.

    Args:
        app: Name of the Serve application.
        address: Passed to ``ray.init`` if this process is not connected to Ray.
        timeout_s: Longest wait for an answer, or for the next piece of a stream, in seconds; then
            ``TimeoutError``. None: no limit.
    """

    def __init__(
        self, app: str = "tandem", *, address: str = "auto", timeout_s: float | None = 600.0
    ) -> None:
        self._session = Session(app, address, timeout_s)

    def __reduce__(self) -> tuple[Any, ...]:
        session = self._session
        make = partial(Tandem, session.app, address=session.address, timeout_s=session.timeout_s)
        return make, ()

    def close(self) -> None:
        """Close the connections of synchronous calls."""
        self._session.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
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
        """Continue one or many prompts; ``sampling`` are parameters of ``/v1/completions``."""
        return self._session.wait_for(self.agenerate(prompt, model=model, **sampling))

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
        requests = wire.generate_requests(prompt, model, sampling)
        return _unlist(prompt, await self._session.run(requests))

    # -- chat ---------------------------------------------------------------------------------

    def chat(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> Completion:
        """Answer a conversation: a string, or messages with role and content."""
        return self._session.wait_for(self.achat(conversation, model=model, **sampling))

    async def achat(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> Completion:
        return (await self.achats([conversation], model=model, **sampling))[0]

    def chats(
        self,
        conversations: Sequence[wire.Conversation],
        *,
        model: str | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Answer many conversations concurrently; the answers are in order."""
        return self._session.wait_for(self.achats(conversations, model=model, **sampling))

    async def achats(
        self,
        conversations: Sequence[wire.Conversation],
        *,
        model: str | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        requests = [wire.chat_request(one, model, sampling) for one in conversations]
        return await self._session.run(requests)

    # -- stream -------------------------------------------------------------------------------

    def stream(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> Iterator[Delta]:
        """Answer a conversation and yield the pieces as the model generates them."""
        batches = self._session.delta_batches(wire.stream_body(conversation, model, sampling))
        yield from self._session.iterate(batches)

    async def astream(
        self, conversation: wire.Conversation, *, model: str | None = None, **sampling: Any
    ) -> AsyncIterator[Delta]:
        body = wire.stream_body(conversation, model, sampling)
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
        """Classify one or many texts; options: ``model``, ``top_k``, ``truncate``."""
        return self._session.wait_for(self.aclassify(text, **options))

    @overload
    async def aclassify(self, text: str, **options: Any) -> Classification: ...
    @overload
    async def aclassify(self, text: Sequence[str], **options: Any) -> list[Classification]: ...
    async def aclassify(
        self, text: str | Sequence[str], **options: Any
    ) -> Classification | list[Classification]:
        requests = wire.text_requests("/classify", text, options, wire.classifications)
        return _unlist(text, await self._session.run(requests))

    @overload
    def embed(self, text: str, **options: Any) -> Embedding: ...
    @overload
    def embed(self, text: Sequence[str], **options: Any) -> list[Embedding]: ...
    def embed(self, text: str | Sequence[str], **options: Any) -> Embedding | list[Embedding]:
        """Embed one or many texts; options: ``model``, ``dimensions``."""
        return self._session.wait_for(self.aembed(text, **options))

    @overload
    async def aembed(self, text: str, **options: Any) -> Embedding: ...
    @overload
    async def aembed(self, text: Sequence[str], **options: Any) -> list[Embedding]: ...
    async def aembed(
        self, text: str | Sequence[str], **options: Any
    ) -> Embedding | list[Embedding]:
        requests = wire.text_requests("/v1/embeddings", text, options, wire.embeddings)
        return _unlist(text, await self._session.run(requests))

    # -- other classifier tasks ---------------------------------------------------------------

    def entities(self, texts: Sequence[str], **options: Any) -> list[list[Entity]]:
        """Find entities in each text; options: ``model``, ``aggregation_strategy``, ``stride``."""
        return self._session.wait_for(self.aentities(texts, **options))

    async def aentities(self, texts: Sequence[str], **options: Any) -> list[list[Entity]]:
        requests = wire.text_requests("/token-classification", texts, options, wire.entities)
        return await self._session.run(requests)

    def fill_mask(self, texts: Sequence[str], **options: Any) -> list[list[list[Candidate]]]:
        """Fill each mask of each text with candidates; options: ``model``, ``top_k``."""
        return self._session.wait_for(self.afill_mask(texts, **options))

    async def afill_mask(self, texts: Sequence[str], **options: Any) -> list[list[list[Candidate]]]:
        requests = wire.text_requests("/fill-mask", texts, options, wire.candidates)
        return await self._session.run(requests)

    def score(self, text: str, others: Sequence[str], **options: Any) -> list[float]:
        """Score the similarity of ``text`` to each of ``others``."""
        return self._session.wait_for(self.ascore(text, others, **options))

    async def ascore(self, text: str, others: Sequence[str], **options: Any) -> list[float]:
        body = {"text_1": text, "text_2": list(others), **options}
        return await self._session.run([wire.ApiRequest("/score", body, wire.scores)])

    def rerank(self, query: str, documents: Sequence[str], **options: Any) -> list[Ranked]:
        """Rank documents by relevance to ``query``, best first; options: ``top_n``."""
        return self._session.wait_for(self.arerank(query, documents, **options))

    async def arerank(self, query: str, documents: Sequence[str], **options: Any) -> list[Ranked]:
        body = {"query": query, "documents": list(documents), **options}
        return await self._session.run([wire.ApiRequest("/rerank", body, wire.rankings)])

    # -- batches ------------------------------------------------------------------------------

    def submit_batch(self, lines: Sequence[Mapping[str, Any]], *, hours: int = 24) -> BatchState:
        """Run requests at the lowest priority, for at most ``hours`` hours.

        Each has the fields of OpenAI's batch format: ``custom_id``, ``method``, ``url``, ``body``.
        """
        return self._session.wait_for(self.asubmit_batch(lines, hours=hours))

    async def asubmit_batch(
        self, lines: Sequence[Mapping[str, Any]], *, hours: int = 24
    ) -> BatchState:
        if not lines:
            raise InvalidRequestError("A batch needs at least one request.")
        (file_id,) = await self._session.run([wire.upload_request(lines)])
        request = wire.batch_request(file_id, str(lines[0].get("url")), hours)
        return _batch(await self._session.run([request]))

    def batch(self, batch_id: str) -> BatchState:
        """Return a batch and its progress."""
        return self._session.wait_for(self.abatch(batch_id))

    async def abatch(self, batch_id: str) -> BatchState:
        request = wire.ApiRequest(f"/v1/batches/{batch_id}", None, wire.batch_state)
        return _batch(await self._session.run([request]))

    def cancel_batch(self, batch_id: str) -> BatchState:
        """Stop a batch; its results so far stay."""
        return self._session.wait_for(self.acancel_batch(batch_id))

    async def acancel_batch(self, batch_id: str) -> BatchState:
        request = wire.ApiRequest(f"/v1/batches/{batch_id}/cancel", {}, wire.batch_state)
        return _batch(await self._session.run([request]))

    def batch_results(self, batch_id: str) -> list[dict[str, Any]]:
        """Return the result of each line of a batch that has ended, failed lines last."""
        return self._session.wait_for(self.abatch_results(batch_id))

    async def abatch_results(self, batch_id: str) -> list[dict[str, Any]]:
        state = await self.abatch(batch_id)
        files = (state.output_file_id, state.error_file_id)
        return await self._session.run([wire.file_request(file) for file in files if file])

    # -- knowledge bases ----------------------------------------------------------------------

    def knowledge(self, name: str) -> KnowledgeBase:
        """Return a knowledge base by name, to create or to use it."""
        return KnowledgeBase(self._session, name)

    def knowledge_bases(self) -> list[Knowledge]:
        """List the knowledge bases."""
        return self._session.wait_for(self.aknowledge_bases())

    async def aknowledge_bases(self) -> list[Knowledge]:
        return await list_bases(self._session)

    # -- models -------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """List the names of the models."""
        return self._session.wait_for(self.amodels())

    async def amodels(self) -> list[str]:
        return await self._session.run([wire.MODELS])


def _batch(results: list[BatchState]) -> BatchState:
    (batch,) = results
    return batch


def _unlist(argument: str | Sequence[str], results: list[T]) -> T | list[T]:
    return results[0] if isinstance(argument, str) else results
