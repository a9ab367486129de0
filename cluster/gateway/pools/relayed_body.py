"""Body of a replica's response, which another replica continues if the first one is lost."""

import asyncio
import logging
import zlib
from collections.abc import Callable
from time import perf_counter

from cluster.errors import (
    HandoverError,
    LinkError,
    LinkRefusedError,
    RequestError,
    RequestTimeoutError,
    UnavailableError,
    UnsupportedError,
)
from cluster.gateway.error_formats import error_events, first_event_error
from cluster.gateway.messages import Request, Response
from cluster.gateway.pools.attempts import Attempts
from cluster.gateway.pools.forwarding import read_error, replay_of, response_headers
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.slots import Slot
from cluster.gateway.recording.observer import RequestObserver
from cluster.gateway.recording.request_log import ABANDONED, CLIENT_DISCONNECTED
from cluster.link import ClientStream, RequestHead
from cluster.usage import Usage

logger = logging.getLogger("ray.serve.tandem")

_MAX_BEGIN_BYTES = 64 * 1024
_HASHED_BYTES = 64 * 1024

TIMED_OUT = (
    "The answer was not complete within `x-request-timeout-seconds`. Allow more time, or request "
    "fewer tokens."
)


class LostRaceError(LinkRefusedError):
    """Another replica answered first."""


class Race:
    """Tries of one request at several replicas; the first with an answer wins."""

    def __init__(self) -> None:
        self.runners: list[RelayedBody] = []
        """The tries, in the order of their starts."""
        self.winner: RelayedBody | None = None

    def win(self, runner: "RelayedBody") -> bool:
        """Return True if this try may answer; the others are then cancelled."""
        if self.winner is None:
            self.winner = runner
            for other in self.runners:
                if other is not runner:
                    other.lose()
        return self.winner is runner

    def records(self, runner: "RelayedBody") -> bool:
        """Return True if this try records the end of the request."""
        return runner is (self.winner or self.runners[0])


class RelayedBody:
    """Body of a replica's response.

    Releases the slot and ends the observation when the replica has finished, however slowly the
    client reads. If the client disconnects, that is when the replica has reported the usage.
    """

    def __init__(
        self,
        pool: Pool,
        slot: Slot,
        request: Request,
        observer: RequestObserver,
        race: Race | None = None,
    ) -> None:
        self.write: Callable[[bytes], bool] | None = None
        """Writes a piece to the client at once, or returns False if it must be iterated over."""
        self._race = race
        self._pool = pool
        self._request = request
        self._observer = observer
        self._attempts = Attempts(pool, slot, request, observer)
        self._attempts.on_finished = self._end
        self._content = 0  # hash of the request
        self._is_event_stream = False
        self._first: bytes | None = None  # first chunk, until it is passed on
        self._begin = b""  # first chunk of an event stream, for the events after a failure
        self._last = b""
        self._is_read = False  # True once the client gets nothing more
        self._ended = False

    async def open(self, head: RequestHead, body: bytes) -> Response:
        """Send the request; return the response that has this body once its first byte is here.

        Raises:
            LinkError: The replica was lost or refused the request.
            UnavailableError: The replica cannot answer now.
            RequestError: The replica answered with an error, as status or as the first event.
        """
        self._content = zlib.crc32(memoryview(body)[:_HASHED_BYTES]) << 32 | len(body)
        try:
            answer = self._attempts.open(head, body)
            arrivals_s = self._observer.new_write_times()
            if isinstance(answer, ClientStream):
                answer.arrivals_s = arrivals_s
            with self._attempts.yielding(answer):
                response = await answer.head()
                if self._attempts.kept is not None:
                    self._attempts.kept.adopt_id(response)
                headers = response_headers(response)
                self._is_event_stream = any(
                    name == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in headers
                )
                if response.status >= 400 and not self._is_event_stream:
                    headers, self._first = await read_error(self._request.path, response, answer)
                    self._check_status(response.status)
                else:
                    self._first = await answer.read()
            self._observer.replay = replay_of(response)
            if self._is_event_stream and (error := first_event_error(self._first)) is not None:
                raise error
            if self._race is not None and not self._race.win(self):
                raise LostRaceError
            if self._is_event_stream and len(self._first) <= _MAX_BEGIN_BYTES:
                self._begin = self._first
        except asyncio.CancelledError:
            if self._race is None or self._race.records(self):
                self._observer.ends_later = True
                await self.aclose()
            else:
                self.drop()
            raise
        except RequestError as error:
            is_trial = self._pool.replicas.is_trial(self._attempts.slot)
            self._record_failure(error.status)
            self.drop(0.0)
            if is_trial and _is_replicas_fault(error.status):
                raise UnavailableError(f"A trial failed: {error}") from error
            raise
        except BaseException as error:
            self.drop(None if isinstance(error, LostRaceError) else 0.0)
            raise
        self._observer.status = response.status
        if self._is_event_stream and self._first:
            self._observer.write_times = arrivals_s or [perf_counter()]
            self._pool.replicas.first_token(self._attempts.slot)
        if isinstance(answer, ClientStream):
            if not self._is_event_stream:
                answer.arrivals_s = None
            self._attempts.watch(answer)
        return Response(response.status, headers, self)

    @property
    def replica_id(self) -> str:
        """Id of the replica that answers now."""
        return self._attempts.slot.replica.info.id

    @property
    def usage(self) -> Usage | None:
        """Usage of the request; known once its response has ended."""
        answer = self._attempts.answer
        return answer.usage if answer is not None else None

    def __aiter__(self) -> "RelayedBody":
        return self

    async def __anext__(self) -> bytes:
        if self._is_read:
            raise StopAsyncIteration
        chunk, self._first = self._first, None
        if chunk is None:
            chunk = await self._read()
        if not chunk:
            self._is_read = True
            self._end()
            raise StopAsyncIteration
        self._last = chunk
        return chunk

    async def aclose(self) -> None:
        """Cancel the rest of the response, if any."""
        if not self._is_read:
            self._abandon(CLIENT_DISCONNECTED)

    def lose(self) -> None:
        """Stop this try: another one has won the race."""
        answer = self._attempts.answer
        if isinstance(answer, ClientStream):
            answer.abandon(LostRaceError())

    def drop(self, done_tokens: float | None = None) -> None:
        """Release what this try holds; another one answers the request, or the caller fails it."""
        self._attempts.end()
        self._release_slot(done_tokens)
        if self._attempts.answer is not None:
            self._attempts.answer.cancel()

    def _check_status(self, status: int) -> None:
        """Raise if another try should answer instead of this one with an error.

        Raises:
            UnavailableError: This is a trial, and the replica failed.
            LinkRefusedError: This is not the first try of a race.
        """
        if _is_replicas_fault(status) and self._pool.replicas.is_trial(self._attempts.slot):
            raise UnavailableError(f"A trial failed with status {status}.")
        self._record_failure(status)
        if self._race is not None and self._race.runners[0] is not self:
            raise LostRaceError

    def _record_failure(self, status: int) -> None:
        if _is_replicas_fault(status):
            self._pool.replicas.record_failure(self._attempts.slot, self._content)

    async def _read(self) -> bytes:
        answer, kept = self._attempts.answer, self._attempts.kept
        assert answer is not None
        claim = self._attempts.slot.claim
        if self.write is not None and isinstance(answer, ClientStream) and not answer.ended:
            answer.sink = self._pass_on
        try:
            if not claim.has_deadline:
                chunk = await answer.read()
            else:
                async with asyncio.timeout_at(claim.deadline_s):
                    chunk = await answer.read()
        except (LinkError, RequestError) as error:
            return await self._recover(error)
        except TimeoutError:
            return self._time_out()
        except BaseException:
            await self.aclose()
            raise
        if kept is None:
            if chunk and self._is_event_stream and not isinstance(answer, ClientStream):
                self._observer.write_times.append(perf_counter())
        elif len(kept.record.journal) > kept.max_journal_bytes:
            self._attempts.grow()
        return chunk

    def _pass_on(self, chunk: bytes) -> bool:
        """Write a piece that has just arrived; return False if it cannot be written now."""
        # Hot path: once for each token.
        if self.write is None or not self.write(chunk):
            return False
        self._last = chunk
        kept = self._attempts.kept
        if kept is not None and len(kept.record.journal) > kept.max_journal_bytes:
            self._attempts.grow()
        return True

    async def _recover(self, error: LinkError | RequestError) -> bytes:
        """Return the next piece from another replica, or the event that ends a broken stream.

        Raises:
            LinkError, RequestError: See ``_last_event``.
        """
        claim = self._attempts.slot.claim
        # A broken link counts by itself, and no replica can continue an answer that would differ.
        if not isinstance(error, LinkError | HandoverError):
            self._record_failure(error.status)
        try:
            async with asyncio.timeout_at(claim.deadline_s if claim.has_deadline else None):
                return await self._attempts.hand_over(error, self._content)
        except (LinkError, RequestError) as last:
            self._is_read = True
            self._end(last)
            return self._last_event(last)
        except TimeoutError:
            return self._time_out()
        except BaseException:
            await self.aclose()
            raise

    def _time_out(self) -> bytes:
        self._abandon(RequestTimeoutError.status)
        return self._last_event(RequestTimeoutError(TIMED_OUT))

    def _abandon(self, status: int) -> None:
        self._is_read = True
        answer = self._attempts.answer
        if not self._ended and answer is not None:
            self._observer.status = status
            if isinstance(answer, ClientStream) and not answer.ended:
                answer.on_finished = self._end
                answer.cancel(is_final=self._is_cancelled())
                return
        self._end()

    def _is_cancelled(self) -> bool:
        """Return True if the answer will not be asked for again: client or guard ended it."""
        notes = self._request.guard_notes
        return self._request.is_cancelled() or (notes is not None and notes.status is not None)

    def _last_event(self, error: LinkError | RequestError) -> bytes:
        """Return the error event that ends a broken stream.

        Raises:
            LinkError, RequestError: The format has no such event, or the last event is incomplete;
                only closing the connection shows the client that the response is incomplete.
        """
        if not self._is_event_stream or not self._last.endswith(b"\n"):
            raise error
        if isinstance(error, LinkError):
            error = UnavailableError("The replica was lost during the response; try again.")
        event = error_events(self._request.path, error, self._begin, self._last)
        if event is None:
            raise error
        return event if self._last.endswith(b"\n\n") else b"\n" + event

    def _end(self, error: Exception | None = None) -> None:
        """Release the slot and record the end of the request, once."""
        if self._ended:
            return
        self._ended = True
        self._attempts.end()
        slot = self._attempts.slot
        observer, usage = self._observer, self.usage
        if error is not None:
            self._pool.meter.cut_off.add()
            observer.is_cut_off = True
            logger.warning("%s: response cut off: %s", self._request.id, error)
        elif observer.status not in ABANDONED:
            if slot.replica.is_draining:
                self._pool.meter.failed_over("drained")
            if observer.status < 500 and not self._was_held_back:
                self._pool.replicas.record_answer(slot, usage)
            claim = slot.claim
            # Requests that share an answer divide its usage.
            if usage is not None and usage.total_tokens and claim.joins is None:
                self._pool.estimator.learn_usage(
                    claim.body_bytes, usage, claim.prompt, claim.view.fan_out
                )
        self._release_slot(self._done_tokens(usage), usage)
        observer.end(usage)

    @property
    def _was_held_back(self) -> bool:
        """True if the answer took as long as the client to read it."""
        answer = self._attempts.answer
        return isinstance(answer, ClientStream) and answer.was_held_back

    def _done_tokens(self, usage: Usage | None) -> float | None:
        """Return the work that was done; None if unknown, which teaches no service time."""
        if self._attempts.slot.claim.joins is not None:
            return None
        if usage is not None:
            return float(usage.computed_tokens)
        if self._observer.status in ABANDONED:
            return None
        return 0.0 if self._observer.status >= 400 else None

    def _release_slot(self, done_tokens: float | None, usage: Usage | None = None) -> None:
        observer = self._observer
        is_abandoned = observer.status in ABANDONED or observer.is_cut_off or self._was_held_back
        self._attempts.release_slot(done_tokens, usage, is_abandoned=is_abandoned)


def _is_replicas_fault(status: int) -> bool:
    """Return True if a status shows that the replica failed; 501 is the answer of any replica."""
    return status >= 500 and status != UnsupportedError.status
