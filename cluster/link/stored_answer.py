"""One answer that a replica keeps: the application's task, and everything that it has sent.

The application has its own task, apart from those of the streams, so the answer goes on when the
router or the client is gone. Each stream that wants the answer follows it from its start.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec

from cluster.asgi import JOURNAL, USAGE, ASGIApp, Journal, Message, Scope
from cluster.errors import InternalError, RequestError, UnavailableError
from cluster.link.connection import Signal
from cluster.link.frames import CHUNK_BYTES, AnswerKey
from cluster.link.local import MAX_UNREAD_BYTES
from cluster.usage import Usage, UsageCounter

logger = logging.getLogger(__name__)

PIECE_BYTES = 200
"""Memory that one piece takes besides its content: a tuple and two bytes objects."""
REPLAYED = (b"idempotent-replayed", b"true")
"""Header of an answer that an earlier request began."""
REPLAY_HEADER = b"x-tandem-replay"
"""Header for the router: ``joined`` if the answer was running, ``finished`` if it was complete."""


class Follower(Protocol):
    """A stream as a stored answer sees it."""

    journal: Journal | None
    report_usage: Callable[[], Usage | None]
    """Returns the usage for the router."""

    async def send(self, message: Message) -> None:
        """Send an ASGI message; raise OSError if the router is gone."""


class StoredAnswer:
    """Answer to one request.

    Args:
        key: Key of the request.
        keeps_journal: True if the application keeps a journal.
        on_growth: Called with the additional bytes; may set ``is_kept`` to False.
        on_end: Called once the application has ended.
    """

    def __init__(
        self,
        key: AnswerKey,
        keeps_journal: bool,
        on_growth: Callable[["StoredAnswer", int], None],
        on_end: Callable[["StoredAnswer"], None],
    ) -> None:
        self.key = key
        self.kept_bytes = 0
        """Its share of the store's limit."""
        self.is_kept = True
        """False if pieces that all followers have sent are dropped, so no other can follow."""
        self.is_complete = False
        """True once the application has sent the end."""
        self.has_ended = False
        """True once the application has returned or failed."""
        self.followers: dict[Follower, int] = {}
        """Streams that follow, with the number of pieces that they have taken."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends the answer, or drops it; owned by the store."""
        self.task: asyncio.Task[None] | None = None
        self._on_growth = on_growth
        self._on_end = on_end
        self._usage = UsageCounter()
        self._reported = Usage(0, 0, 0)  # usage that streams have reported
        self._journal = Journal() if keeps_journal else None
        self._earlier = b""
        self._head: Message | None = None
        self._pieces: list[tuple[bytes, bytes]] = []  # journal entries, body
        self._num_dropped = 0  # pieces before the first one
        self._held_bytes = 0
        self._body: bytes | None = None
        self._error: BaseException | None = None
        self._is_aborted = False
        self._changed = Signal()
        self._sent = Signal()

    @property
    def status(self) -> int:
        """Status of the response; 0 before its head."""
        return 0 if self._head is None else int(self._head["status"])

    def start(self, app: ASGIApp, scope: Scope, body: bytes, earlier: bytes) -> None:
        """Run the application on a request whose body is complete.

        Args:
            app: The application.
            scope: Scope of the stream that brought the request.
            body: The request's body.
            earlier: Journal of the replicas that gave the answer so far.
        """
        extensions = {**scope["extensions"], USAGE: self._usage}
        if self._journal is not None:
            self._journal.earlier = self._earlier = earlier
            extensions[JOURNAL] = self._journal
        self._body = body
        inner = {**scope, "extensions": extensions}
        self.task = asyncio.create_task(self._run(app, inner))

    async def follow(self, stream: Follower, *, is_replay: bool) -> None:
        """Send the whole answer to a stream, what exists already at once.

        Raises:
            OSError: The router is gone.
            Exception: The error with which the application failed.
        """
        self.followers[stream] = self._num_dropped
        stream.report_usage = self.take_usage
        try:
            while self._head is None:
                await self._wait()
            head = self._head
            if is_replay:
                kind = b"finished" if self.is_complete else b"joined"
                added = (REPLAYED, (REPLAY_HEADER, kind))
                head = {**head, "headers": [*head.get("headers", ()), *added]}
            await stream.send(head)
            await self._send_pieces(stream)
        finally:
            del self.followers[stream]
            self._sent.fire()

    async def abort_and_wait(self) -> None:
        """Stop the application; return when it has ended, so that its usage is known."""
        self.abort()
        if self.task is not None:
            await asyncio.wait([self.task])

    def abort(self) -> None:
        """Stop the application."""
        if not self.has_ended and self.task is not None:
            self._is_aborted = True
            self._changed.fire()
            self._sent.fire()
            self.task.cancel()

    def take_usage(self) -> Usage | None:
        """Return the usage since the last call, so that it is charged once among all requests.

        None if the application counts no tokens. Energy and cost are part of the usage at the end.
        """
        counter, reported = self._usage, self._reported
        if self.is_complete or self.has_ended:
            usage = counter.report()
        else:
            counts = (counter.prompt_tokens, counter.cached_tokens, counter.completion_tokens)
            usage = Usage(*counts) if any(counts) else None
        if usage is None:
            return None
        self._reported = usage
        share = msgspec.structs.replace(
            usage,
            prompt_tokens=usage.prompt_tokens - reported.prompt_tokens,
            cached_tokens=usage.cached_tokens - reported.cached_tokens,
            completion_tokens=usage.completion_tokens - reported.completion_tokens,
        )
        if reported.cost is not None or reported.joules is not None:
            return msgspec.structs.replace(share, joules=None, cost=None)
        return share

    # -- for the application --

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        try:
            await app(scope, self._receive, self._send)
        except asyncio.CancelledError:
            self._error = UnavailableError("The replica stopped before the response was complete.")
        except Exception as error:  # the followers raise it, or the log has it
            self._error = error
            if not self.followers and not self._is_aborted and not isinstance(error, RequestError):
                logger.exception("%s %s failed", scope["method"], scope["path"])
        finally:
            self.has_ended = True
            self._changed.fire()
            self._on_end(self)

    async def _receive(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        while not (self._is_aborted or self.is_complete):
            await self._changed.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._is_aborted:
            raise OSError("the clients are gone")
        if message["type"] == "http.response.start":
            self._head = message
        else:
            entries, journal = b"", self._journal
            if journal is not None and journal.unsent:
                entries, journal.unsent = journal.unsent, b""
            body = bytes(message.get("body", b""))
            self._pieces.append((entries, body))
            self._held_bytes += len(body)
            self.is_complete = not message.get("more_body", False)
            if self.is_kept:
                self._on_growth(self, len(entries) + len(body) + PIECE_BYTES)
        self._changed.fire()
        while not self.is_kept and self._held_bytes > MAX_UNREAD_BYTES and not self._is_aborted:
            await self._sent.wait()

    # -- for the followers --

    async def _send_pieces(self, stream: Follower) -> None:
        journal = stream.journal
        skipped = 0 if journal is None else len(journal.earlier)  # the router has these entries
        if journal is not None:
            skipped = _add(journal, self._earlier, skipped)
        while True:
            while (entries_and_body := self._take(stream)) is None:
                await self._wait()
            entries, body = entries_and_body
            if journal is not None and entries:
                skipped = _add(journal, entries, skipped)
            is_last = self.is_complete and self._num_left(stream) == 0
            await stream.send({"type": _BODY, "body": body, "more_body": not is_last})
            if is_last:
                return

    def _num_left(self, stream: Follower) -> int:
        return self._num_dropped + len(self._pieces) - self.followers[stream]

    def _take(self, stream: Follower) -> tuple[bytes, bytes] | None:
        """Return the next pieces, joined up to a frame's size; None if there are none."""
        num_left = self._num_left(stream)
        if not num_left:
            return None
        start = end = len(self._pieces) - num_left
        size = 0
        while end < len(self._pieces) and (end == start or size < CHUNK_BYTES // 2):
            size += len(self._pieces[end][1])
            end += 1
        taken = self._pieces[start:end]
        self.followers[stream] += end - start
        if not self.is_kept:
            self._drop_sent()
        if len(taken) == 1:
            return taken[0]
        return b"".join(entries for entries, _ in taken), b"".join(body for _, body in taken)

    def _drop_sent(self) -> None:
        num_sent = min(self.followers.values(), default=self._num_dropped) - self._num_dropped
        self._held_bytes -= sum(len(body) for _, body in self._pieces[:num_sent])
        del self._pieces[:num_sent]
        self._num_dropped += num_sent
        self._sent.fire()

    async def _wait(self) -> None:
        """Wait for progress.

        Raises:
            Exception: The application has failed.
        """
        if self.has_ended:
            raise self._error or InternalError("The application returned without a response.")
        await self._changed.wait()


_BODY = "http.response.body"


def _add(journal: Journal, entries: bytes, skipped: int) -> int:
    """Add the entries behind the first ``skipped`` bytes; return the bytes still to be skipped."""
    journal.add(entries[skipped:])
    return max(0, skipped - len(entries))
