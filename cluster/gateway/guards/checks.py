"""One guard: what it finds in texts, by patterns or with a classifier of a pool."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from time import perf_counter
from typing import Literal, Protocol, TypeVar

import msgspec

from cluster.config import GuardAction, GuardConfig
from cluster.config.guards import GuardOutcome
from cluster.errors import (
    GuardUnreadableError,
    LinkError,
    RequestError,
    TandemError,
    UnavailableError,
)
from cluster.gateway.messages import Request, Response
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.slots import Claim
from cluster.guards import Span, find_patterns
from cluster.metrics import Registry, table

logger = logging.getLogger("ray.serve.tandem")

Stage = Literal["prompt", "answer"]
SendCheck = Callable[[Request, Pool, Claim], Awaitable[Response]]
"""Sends a request of a guard to a pool."""

MAX_TEXTS = 64
"""Texts per request to a classifier."""
_STRIDE_TOKENS = 32
"""Overlap of windows of texts that exceed a classifier's context. Short texts have it, too, because
a result cache distinguishes texts by how they are read."""
_THREAD_CHARS = 4096  # a thread searches longer texts; at worst ("4 4 4 …"), these take 20 ms
_LONG_CHARS = 20_000
"""A client could make the check of a longer prompt time out, so that no open guard lets it pass."""
_SENDERS_FAULTS = (400, 413, 422)
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_CLASSIFY, _FIND_ENTITIES = "/classify", "/token-classification"


_OUTCOMES: Mapping[GuardAction, GuardOutcome] = {
    "block": "blocked",
    "flag": "flagged",
    "redact": "redacted",
}


_T = TypeVar("_T")


async def run_sized(size: int, work: Callable[[], _T], limit: int = _THREAD_CHARS) -> _T:
    """Return the result of work, in a thread if that would stop the event loop.

    Args:
        size: Characters that are searched, or bytes that are decoded.
        work: The work.
        limit: Largest size for the event loop; the default is that of searches.
    """
    return await asyncio.to_thread(work) if size > limit else work()


class CheckFailedError(TandemError):
    """A guard could not check a text."""

    def __init__(self, message: str, *, is_senders: bool = False) -> None:
        super().__init__(message)
        self.is_senders = is_senders
        """True if the text is the cause, so that an open guard must not let it pass."""


class Check(Protocol):
    """Search for what a guard is about."""

    finds_parts: bool
    """True if results are parts of a text, False if they are labels of the whole text."""

    async def find(self, texts: Sequence[str], request: Request) -> list[list[Span]]:
        """Return what each text contains.

        Raises:
            CheckFailedError: The texts could not be checked.
        """


class PatternCheck:
    """Check by patterns."""

    finds_parts = True

    def __init__(self, config: GuardConfig) -> None:
        self.patterns = config.patterns

    async def find(self, texts: Sequence[str], request: Request) -> list[list[Span]]:
        return await run_sized(sum(map(len, texts)), partial(self._find, texts))

    def _find(self, texts: Sequence[str]) -> list[list[Span]]:
        return [find_patterns(text, self.patterns)[0] for text in texts]


class _Label(msgspec.Struct):
    label: str
    score: float


class _Entity(_Label):
    start: int
    end: int


class _Result(msgspec.Struct):
    scores: list[_Label] = []
    entities: list[_Entity] = []


class _Reply(msgspec.Struct):
    data: list[_Result]


class ClassifierCheck:
    """Check with a classifier of the same cluster."""

    def __init__(self, config: GuardConfig, pool: Pool, send: SendCheck, *, entities: bool) -> None:
        self.finds_parts = entities
        self._config = config
        self._pool = pool
        self._send = send
        self._path = _FIND_ENTITIES if entities else _CLASSIFY
        self._labels = frozenset(config.labels)

    async def find(self, texts: Sequence[str], request: Request) -> list[list[Span]]:
        found: list[list[Span]] = []
        try:
            async with asyncio.timeout(self._config.timeout_s):
                for start in range(0, len(texts), MAX_TEXTS):
                    part = texts[start : start + MAX_TEXTS]
                    reply = await self._ask(part, request)
                    pairs = zip(part, reply.data, strict=True)
                    found += [self._spans(text, result) for text, result in pairs]
        except TimeoutError:
            num_chars = sum(map(len, texts))
            raise CheckFailedError(
                f"no answer within {self._config.timeout_s:g} s for {num_chars} characters",
                is_senders=num_chars > _LONG_CHARS,
            ) from None
        except RequestError as error:
            raise CheckFailedError(
                str(error), is_senders=error.status in _SENDERS_FAULTS
            ) from error
        except (LinkError, msgspec.DecodeError, ValueError) as error:
            raise CheckFailedError(str(error)) from error
        return found

    async def _ask(self, texts: Sequence[str], request: Request) -> _Reply:
        # JSON may have half of a surrogate pair, which UTF-8 cannot encode.
        valid = [text.encode(errors="replace").decode() for text in texts]
        windows = {"stride": _STRIDE_TOKENS, "aggregate": "max"}
        body = msgspec.json.encode({"model": self._config.classifier, "input": valid, **windows})
        headers = [(b"content-type", b"application/json")]
        headers += [pair for pair in request.headers if pair[0] in _TRACE_HEADERS]
        check = Request(
            *(request.id, "POST", self._path, b"", headers, body, request.identity), is_copy=True
        )
        expires_s = asyncio.get_running_loop().time() + self._config.timeout_s
        claim = Claim(
            identity=request.identity,
            work_tokens=max(1.0, len(body) / 4),
            body_bytes=len(body),
            priority=request.identity.priority,
            expires_s=expires_s,
            deadline_s=expires_s,
        )
        response = await self._send(check, self._pool, claim)
        async with aclosing(response.body) as chunks:
            content = b"".join([chunk async for chunk in chunks])
        if response.status != 200:
            raise CheckFailedError(
                f"{self._pool.name} answered with status {response.status}",
                is_senders=response.status in _SENDERS_FAULTS,
            )
        return msgspec.json.decode(content, type=_Reply)

    def _spans(self, text: str, result: _Result) -> list[Span]:
        if self.finds_parts:
            return [
                Span(entity.start, entity.end, entity.label, entity.score)
                for entity in result.entities
                if self._counts(entity)
            ]
        return [
            Span(0, len(text), each.label, each.score)
            for each in result.scores
            if self._counts(each)
        ]

    def _counts(self, found: _Label) -> bool:
        is_wanted = not self._labels or found.label in self._labels
        return is_wanted and found.score >= self._config.threshold


class Guard:
    """A guard of the configuration with its check and its metrics."""

    def __init__(self, config: GuardConfig, check: Check, registry: Registry) -> None:
        self.config = config
        self.check = check
        self._registry = registry

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def changes_text(self) -> bool:
        """True if the guard must decide before the text is passed on."""
        return self.config.action != "flag"

    async def find(
        self, texts: Sequence[str], request: Request, model: str, stage: Stage
    ) -> list[list[Span]] | None:
        """Return what each text contains; None if the check failed and the guard is open.

        Raises:
            GuardUnreadableError: The check failed because of the texts.
            UnavailableError: The check failed and the guard is closed.
        """
        start_s = perf_counter()
        try:
            return await self.check.find(texts, request)
        except CheckFailedError as error:
            logger.warning(
                "%s: guard %s could not check the %s: %s", request.id, self.name, stage, error
            )
            if error.is_senders:
                raise GuardUnreadableError.by(self.name, f"this {stage}: {error}") from error
            if self.config.on_error == "open":
                return None
            raise UnavailableError(
                f"The guard `{self.name}` could not check the {stage}; try again.", retry_after_s=1
            ) from error
        finally:
            histogram = self._registry.histogram(table.GUARD_SECONDS, model, self.name, stage)
            histogram.observe(perf_counter() - start_s)

    @property
    def outcome(self) -> GuardOutcome:
        """GuardOutcome if the guard finds something."""
        return _OUTCOMES[self.config.action]

    def create_series(self, model: str) -> None:
        """Create the guard's counters at 0: a rate would miss the first event of a new series."""
        stages: dict[Stage, bool] = {
            "prompt": self.config.checks_prompts,
            "answer": self.config.checks_answers,
        }
        for stage, is_checked in stages.items():
            # An answer does not wait for a guard that only reports, so that cannot refuse it.
            is_open = self.config.on_error == "open" or (
                stage == "answer" and not self.changes_text
            )
            failure: GuardOutcome = "unchecked" if is_open else "refused"
            outcomes: tuple[GuardOutcome, ...] = ("passed", self.outcome, failure, "unreadable")
            for outcome in outcomes if is_checked else ():
                self._registry.counter(table.GUARD_CHECKS, model, self.name, stage, outcome)

    def count(self, model: str, stage: Stage, outcome: GuardOutcome) -> None:
        """Count the result of a prompt or an answer."""
        self._registry.counter(table.GUARD_CHECKS, model, self.name, stage, outcome).add()
