"""Answers that survive the loss of their router: the request is repeated, and the answer goes on.

An answer of a generator has an idempotency key, so any router finds it at its replica. All other
requests are computed again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol
from zlib import crc32

from cluster.errors import LinkClosedError, UnavailableError
from cluster.link import ResponseHead

logger = logging.getLogger(__name__)

PAUSES_S = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Pauses before the repetitions of a request without progress, in seconds. A router that died is
replaced within about 4 s, and Serve's handle waits for it."""
_LOST = (LinkClosedError, UnavailableError)  # UnavailableError: the router stopped
_DIFFERS = (
    "The router was lost during the answer, and the repeated request has another answer; try again."
)


class Answer(Protocol):
    """Response of one router."""

    async def head(self) -> ResponseHead:
        """Wait for the head; raise LinkClosedError if the router is lost."""

    async def read(self) -> bytes:
        """Return the next bytes, b"" at the end; raise LinkClosedError if the router is lost."""

    def cancel(self) -> None:
        """Stop the work on the request."""


class RepeatedAnswer:
    """Response to a request that may be sent more than once.

    Args:
        send: Sends the request to a router that can be reached now.
    """

    def __init__(self, send: Callable[[], Awaitable[Answer]]) -> None:
        self._send = send
        self._answer: Answer | None = None
        self._status = 0
        self._num_failures = 0  # since the last progress
        self._num_bytes = 0  # bytes that the caller has
        self._checksum = 0
        self._unread = b""

    async def head(self) -> ResponseHead:
        """Send the request; return the head of its response.

        Raises:
            LinkClosedError, UnavailableError: No router answers.
        """
        head = await self._repeat()
        self._status = head.status
        return head

    async def read(self) -> bytes:
        """Return the next bytes of the body, b"" at its end.

        Raises:
            LinkClosedError, UnavailableError: The router was lost, and the answer does not go on
                at another one.
        """
        assert self._answer is not None
        data, self._unread = self._unread, b""
        while not data:
            try:
                data = await self._answer.read()
                break
            except _LOST as error:
                logger.info("a router was lost (%s); another one goes on with the answer", error)
                await self._go_on(error)
                data, self._unread = self._unread, b""
        self._num_failures = 0
        self._num_bytes += len(data)
        self._checksum = crc32(data, self._checksum)
        return data

    async def whole(self) -> tuple[ResponseHead, bytes]:
        """Send the request; return its whole response. If a router is lost, it starts over.

        Raises:
            LinkClosedError, UnavailableError: No router answers.
        """
        lost: Exception | None = None
        while True:
            head = await self._repeat(lost)
            assert self._answer is not None
            try:
                return head, await read_all(self._answer)
            except _LOST as error:
                lost = error

    def cancel(self) -> None:
        """Stop the work on the request; may be called at any time."""
        if self._answer is not None:
            self._answer.cancel()

    async def _repeat(self, error: Exception | None = None) -> ResponseHead:
        """Send the request until a router answers."""
        while True:
            if error is not None:
                self.cancel()
                if self._num_failures == len(PAUSES_S):
                    raise error
                await asyncio.sleep(PAUSES_S[self._num_failures])
                self._num_failures += 1
            try:
                self._answer = await self._send()
                return await self._answer.head()
            except _LOST as failure:
                error = failure

    async def _go_on(self, error: Exception) -> None:
        """Repeat the request until the answer has what the caller has."""
        while True:
            head = await self._repeat(error)
            try:
                if head.status == self._status and await self._skip():
                    return
            except _LOST as failure:
                error = failure
            else:
                self.cancel()
                raise UnavailableError(_DIFFERS)

    async def _skip(self) -> bool:
        """Skip what the caller has; return False if the repeated answer differs."""
        assert self._answer is not None
        left, checksum, data = self._num_bytes, 0, b""
        while left:
            data = await self._answer.read()
            if not data:
                return False
            skipped = data[:left]
            checksum = crc32(skipped, checksum)
            left -= len(skipped)
            data = data[len(skipped) :]
        self._unread = data
        return checksum == self._checksum


async def read_all(answer: Answer | RepeatedAnswer) -> bytes:
    """Return the rest of a body."""
    chunks = []
    while chunk := await answer.read():
        chunks.append(chunk)
    return b"".join(chunks)
