"""Answers that a replica keeps, so that a repeated request joins the first one.

Keys reach the replica with the requests; a request without one passes by. The store tells routers
the ids of the answers that it has (ANSWERS frames), so any router finds the replica.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.asgi import ASGIApp, Journal, Message, Scope, read_body
from cluster.config import IdempotencyConfig
from cluster.errors import UnprocessableError
from cluster.link.frames import AnswerKey
from cluster.link.stored_answer import Follower, StoredAnswer

logger = logging.getLogger(__name__)

ANSWER_BYTES = 4096
"""Memory that an answer takes besides its pieces: task, head, timers."""
CONFLICT = (
    "The `Idempotency-Key` was used with another request. Send the same request, or a new key."
)


class Stream(Follower, Protocol):
    """A stream as the store sees it."""

    is_lost: bool
    """True if the stream ended because the connection to the router was lost."""
    is_final: bool
    """True if the router cancelled the stream, and the request will not be repeated."""

    async def receive(self) -> Message:
        """Return the next piece of the request's body; then a disconnect."""


class AnswerStore:
    """Running and finished answers of one replica, by the id of their key.

    ``on_change`` is called with the added and the removed ids.
    """

    def __init__(self, config: IdempotencyConfig) -> None:
        self.on_change: Callable[[Sequence[bytes], Sequence[bytes]], None] = lambda *_: None
        self.used_bytes = 0
        """Share of ``max_kept_bytes`` that is in use."""
        self.config = config
        """Limits; may be replaced."""
        self._answers: dict[bytes, StoredAnswer] = {}  # the oldest first
        self._running: set[StoredAnswer] = set()
        self._is_retired = False

    def ids(self) -> list[bytes]:
        """Return the ids of all kept answers."""
        return list(self._answers)

    @property
    def num_running(self) -> int:
        """Answers whose application has not returned."""
        return len(self._running)

    async def answer(self, app: ASGIApp, scope: Scope, stream: Stream, key: AnswerKey) -> None:
        """Answer a request with a key: join an earlier one, or run the application.

        Raises:
            UnprocessableError: The key belongs to another request.
        """
        body = await read_body(stream.receive)
        if body is None:
            return
        answer = self._answers.get(key.id)
        if answer is not None and answer.key.fingerprint != key.fingerprint:
            raise UnprocessableError(CONFLICT)
        is_replay = answer is not None
        if answer is None:
            answer = self._begin(key, stream.journal)
            earlier = b"" if stream.journal is None else stream.journal.earlier
            answer.start(app, scope, body, earlier)
        elif answer.timer is not None and not answer.has_ended:
            answer.timer.cancel()
        del body
        try:
            await answer.follow(stream, is_replay=is_replay)
        finally:
            if not (answer.followers or answer.has_ended):
                await self._leave(answer, self._grace_s(stream))

    def retire(self) -> None:
        """Drop finished answers, and end running ones as soon as no stream follows them."""
        self._is_retired = True
        for answer in [*self._answers.values()]:
            if answer.has_ended or not answer.followers:
                self._abort(answer)

    async def close(self, timeout_s: float) -> None:
        """End all answers."""
        self.retire()
        tasks = [answer.task for answer in self._running if answer.task is not None]
        for answer in [*self._running]:
            answer.abort()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    # -- internals --

    def _begin(self, key: AnswerKey, journal: Journal | None) -> StoredAnswer:
        answer = StoredAnswer(key, journal is not None, self._on_growth, self._on_end)
        self._running.add(answer)
        self._answers[key.id] = answer
        self.on_change([key.id], ())
        self._on_growth(answer, ANSWER_BYTES)
        return answer

    def _grace_s(self, stream: Stream) -> float:
        """Return how long an answer goes on after its last stream has ended, in seconds."""
        if self._is_retired or stream.is_final:
            return 0.0
        config = self.config
        return config.keep_s if stream.is_lost else min(config.keep_s, config.disconnect_grace_s)

    async def _leave(self, answer: StoredAnswer, grace_s: float) -> None:
        """Go on for some time with an answer that no stream follows any more."""
        if answer.is_kept and grace_s:
            answer.timer = asyncio.get_running_loop().call_later(grace_s, self._abort, answer)
        else:
            self._drop(answer)
            await answer.abort_and_wait()

    def _abort(self, answer: StoredAnswer) -> None:
        self._drop(answer)
        answer.abort()

    def _on_growth(self, answer: StoredAnswer, num_bytes: int) -> None:
        """Count bytes of an answer; drop it if it exceeds the limits."""
        answer.kept_bytes += num_bytes
        self.used_bytes += num_bytes
        if answer.kept_bytes > self.config.max_answer_bytes or not self._make_room():
            self._drop(answer)
            if not answer.followers:
                answer.abort()

    def _make_room(self) -> bool:
        limit = self.config.max_kept_bytes
        while self.used_bytes > limit:
            finished = (a for a in self._answers.values() if a.has_ended and not a.followers)
            if (oldest := next(finished, None)) is None:
                return False
            self._drop(oldest)
        return True

    def _on_end(self, answer: StoredAnswer) -> None:
        self._running.discard(answer)
        if answer.timer is not None:
            answer.timer.cancel()
        # Errors of the replica are not the answer to the request; a repetition tries again.
        is_final = answer.is_complete and answer.status < 500 and answer.status != 429
        if not answer.is_kept or self._is_retired or not is_final:
            self._drop(answer)
            return
        loop = asyncio.get_running_loop()
        answer.timer = loop.call_later(self.config.keep_s, self._drop, answer)

    def _drop(self, answer: StoredAnswer) -> None:
        """Forget an answer; streams that follow it get the rest."""
        if not answer.is_kept:
            return
        answer.is_kept = False
        del self._answers[answer.key.id]
        self.used_bytes -= answer.kept_bytes
        if answer.timer is not None:
            answer.timer.cancel()
        self.on_change((), [answer.key.id])
