"""Passing one request to a replica and its answer back, bytes untouched.

Another replica is tried only while nothing of an answer was seen, so nothing is answered twice.
"""

import asyncio
import json
import logging

from cluster.errors import LinkError, RequestError, UnavailableError
from cluster.gateway.messages import Headers, Request, Response
from cluster.gateway.pool import Pool, Replica
from cluster.link import RequestHead, ResponseHead, Stream

logger = logging.getLogger("ray.serve.tandem")

MAX_ATTEMPTS = 3
"""Replicas that a request is offered to before it fails."""

_LOST = "The replica was lost while it answered."

_HOP_HEADERS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade"})
_CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_NOT_FORWARDED = _HOP_HEADERS | _CREDENTIALS | {b"host", b"x-request-id", b"expect"}
_NOT_RETURNED = _HOP_HEADERS | {b"server", b"date", b"x-request-id"}


async def relay(request: Request, pool: Pool, timeout_s: float | None = None) -> Response:
    """Admit ``request`` to ``pool`` and return a replica's answer, whose body is still growing.

    Args:
        request: What to relay.
        pool: Which replicas may answer.
        timeout_s: The longest wait for a place; None: the pool's own.

    Raises:
        OverloadedError: the pool's queue is full.
        UnavailableError: no replica is there, or each that was tried was lost.
    """
    head = _request_head(request)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (pool.queue_timeout_s if timeout_s is None else timeout_s)
    for _ in range(MAX_ATTEMPTS):
        replica = await pool.admit(max(0.0, deadline - loop.time()))
        try:
            stream = replica.link.open(head, request.body)
        except LinkError:
            pool.release(replica)
            continue
        body = RelayedBody(stream, pool, replica, request.id)
        try:
            answer = await stream.head()
        except (LinkError, UnavailableError) as error:
            await body.aclose()
            logger.warning("%s: replica %s: %s", request.id, replica.info.id, error)
            continue
        except BaseException:
            await body.aclose()
            raise
        return Response(answer.status, body.begin(answer), body)
    raise UnavailableError(
        f"{pool.name}: {MAX_ATTEMPTS} replicas were lost before they answered", retry_after_s=1
    )


class RelayedBody:
    """A replica's answer on its way out; frees the replica's place when it ends in whatever way."""

    def __init__(self, stream: Stream, pool: Pool, replica: Replica, request_id: str) -> None:
        self._stream = stream
        self._pool = pool
        self._replica = replica
        self._request_id = request_id
        self._is_event_stream = False
        self._ended = False

    def begin(self, answer: ResponseHead) -> Headers:
        """Note what kind of body follows; returns the headers that go to the client."""
        headers = [pair for pair in answer.headers if pair[0] not in _NOT_RETURNED]
        self._is_event_stream = any(
            name == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in headers
        )
        return headers

    def __aiter__(self) -> "RelayedBody":
        return self

    async def __anext__(self) -> bytes:
        if self._ended:
            raise StopAsyncIteration
        try:
            chunk = await self._stream.read()
        except (LinkError, RequestError) as error:
            await self.aclose()
            logger.warning("%s: answer cut off: %s", self._request_id, error)
            if not self._is_event_stream:
                raise
            lost = error if isinstance(error, RequestError) else UnavailableError(_LOST)
            return b"data: " + json.dumps(lost.body()).encode() + b"\n\n"
        except BaseException:
            await self.aclose()
            raise
        if not chunk:
            await self.aclose()
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Cancel what is left of the stream and give the replica's place back; once."""
        if not self._ended:
            self._ended = True
            self._stream.cancel()
            self._pool.release(self._replica)


def _request_head(request: Request) -> RequestHead:
    headers: Headers = [pair for pair in request.headers if pair[0] not in _NOT_FORWARDED]
    headers.append((b"x-request-id", request.id.encode()))
    return RequestHead(
        method=request.method, path=request.path, query_string=request.query, headers=headers
    )
