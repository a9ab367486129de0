"""Calls to models that one task makes on behalf of its sender.

All are charged to the sender's tenant. One of them at a time uses the concurrent slot of the task's
own request, so a task makes progress however low the tenant's limit is. Others take a slot of their
own, and wait for the first one if the tenant has none left.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from cluster.client import wire
from cluster.client.results import Completion, Delta
from cluster.client.transport import Headers
from cluster.client.wire import ApiRequest, Conversation
from cluster.errors import OverloadedError
from cluster.gateway.pools.delegation import CALLER_HEADER, GUARDS_HEADER, SHARED_SLOT_HEADER
from cluster.tasks import TaskUsage
from cluster.usage import Usage

T = TypeVar("T")
R = TypeVar("R")

FORWARDED_HEADERS = frozenset(
    {CALLER_HEADER, GUARDS_HEADER, b"traceparent", b"tracestate", b"baggage"}
)
"""Headers of a task's request that its calls have as well."""


class ModelClient(Protocol):
    """Part of ``cluster.client.session.Session`` that tasks use."""

    async def run(self, requests: Sequence[ApiRequest], headers: Headers = ()) -> list[Any]: ...

    def delta_batches(
        self, body: bytes, headers: Headers = ()
    ) -> AsyncGenerator[list[Delta], None]: ...

    async def aclose(self) -> None: ...


class TokenCount(NamedTuple):
    """Length of a text for a model."""

    tokens: int
    context_tokens: int
    """Longest prompt and completion of the model together."""


@dataclass(slots=True)
class UsageSum:
    """Usage of all calls of a task so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    calls: int = 0

    def add(self, usage: Usage) -> None:
        self.calls += 1
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.cached_tokens += usage.cached_tokens

    def report(self) -> TaskUsage:
        return TaskUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            cached_tokens=self.cached_tokens,
            calls=self.calls,
        )


_MAX_ID_CHARS = 115  # of 128, for the number of the call


@dataclass(slots=True)
class Calls:
    """Calls of one task.

    Args:
        id: Id of the task's request, from which the calls' ids are made.
        client: Sends requests to the routers.
        headers: Headers of the task's request.
        max_calls: Maximum number of calls at the same time.
    """

    id: str
    client: ModelClient
    headers: Headers
    max_calls: int
    usage: UsageSum = field(default_factory=UsageSum)
    _num_sent: int = 0
    _limit: asyncio.Semaphore = field(init=False)
    _shared_slot: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.headers = [pair for pair in self.headers if pair[0] in FORWARDED_HEADERS]
        self._limit = asyncio.Semaphore(self.max_calls)

    async def chat(self, conversation: Conversation, model: str, **sampling: Any) -> Completion:
        """Return a generator's answer to a conversation."""
        request = wire.chat_request(conversation, model, sampling)
        completion: Completion = (await self._run(request))[0]
        self.usage.add(completion.usage)
        return completion

    async def stream(
        self, conversation: Conversation, model: str, **sampling: Any
    ) -> AsyncGenerator[Delta, None]:
        """Yield a generator's answer to a conversation piece by piece."""
        body = wire.stream_body(conversation, model, sampling)
        # A stream can last as long as its reader, so it takes the slot that it surely gets.
        batches = self.client.delta_batches(body, self._headers(shares_slot=True))
        async with self._limit, self._shared_slot, aclosing(batches):
            async for deltas in batches:
                for delta in deltas:
                    if delta.usage is not None:
                        self.usage.add(delta.usage)
                    yield delta

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON answer of a model, and count its ``usage``."""
        request = ApiRequest(path, body, lambda answer: [answer])
        answer: dict[str, Any] = (await self._run(request))[0]
        if (usage := answer.get("usage")) is not None:
            self.usage.add(wire.usage_of(usage))
        return answer

    async def ask(self, request: ApiRequest) -> list[Any]:
        """Return the results of a request that is not charged, such as one for tokens."""
        return await self._run(request)

    async def count_tokens(self, model: str, **prompt: Any) -> TokenCount:
        """Return the length of a ``prompt``, or of ``messages``, for a generator."""
        request = ApiRequest("/tokenize", {"model": model, **prompt}, lambda answer: [answer])
        answer = (await self.ask(request))[0]
        return TokenCount(answer["count"], answer["max_model_len"])

    async def map(self, work: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
        """Return the results for all items, in order; see ``results``."""
        async with aclosing(self.results(work, items)) as results:
            return [result async for result in results]

    async def results(
        self, work: Callable[[T], Awaitable[R]], items: Sequence[T]
    ) -> AsyncGenerator[R, None]:
        """Yield the results for all items, in order; if one fails, cancel the others.

        Work begins for ``max_calls`` items at a time, so prompts of the others take no memory.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[R]] = [loop.create_future() for _ in items]
        waiting = iter(list(zip(items, futures, strict=True)))

        async def run_worker() -> None:
            for item, future in waiting:
                try:
                    future.set_result(await work(item))
                except Exception as error:
                    for each in futures:
                        if not each.done():
                            each.set_exception(error)
                    return

        workers = [asyncio.create_task(run_worker()) for _ in items[: self.max_calls]]
        try:
            for future in futures:
                yield await future
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # retrieved, so that asyncio does not log it

    async def _run(self, request: ApiRequest) -> list[Any]:
        async with self._limit:
            if self._shared_slot.locked():
                try:
                    return await self.client.run([request], self._headers())
                except OverloadedError:
                    pass  # perhaps of the tenant's own concurrent requests
            async with self._shared_slot:
                return await self.client.run([request], self._headers(shares_slot=True))

    def _headers(self, *, shares_slot: bool = False) -> Headers:
        self._num_sent += 1
        call_id = f"{self.id[:_MAX_ID_CHARS]}.{self._num_sent}"
        shared = [(SHARED_SLOT_HEADER, b"1")] if shares_slot else []
        return [*self.headers, (b"x-request-id", call_id.encode()), *shared]
