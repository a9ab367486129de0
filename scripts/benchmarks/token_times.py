"""When each token of a stream came: a client of raw sockets for latencies.

Works without an HTTP parser: it looks for the first bytes of events and for the last bytes of an
answer, so noting a token costs microseconds, and its own CPU time is in the result.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import cast

from benchmarks.endpoint import END, Endpoint, TargetError

EVENT = b"data: {"
DONE = b"data: [DONE]"
ANSWER_S = 180.0
OK = b"HTTP/1.1 200"
_KEPT = max(len(DONE), len(END)) - 1
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(slots=True)
class TokenTimes:
    """What the client saw, in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    """From sending a request to its first token, for each request."""
    itl_s: list[float] = field(default_factory=list)
    """Each gap between two tokens; it is 0 between those that came in one piece."""
    num_tokens: int = 0
    """Of all requests, those of the warm-up too."""
    client_cpu_s: float = 0.0
    """The client's own CPU time for all of them."""
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Streams:
    """What is asked for."""

    requests: Iterator[bytes]
    """One for each answer; the streams end with it, where it ends."""
    num: int
    """Streams at a time; each asks again, after a pause, once its answer is whole."""
    pause_s: float
    """The longest pause. Pauses are spread evenly from 0 to it, so that requests meet the
    engine's steps at every phase."""
    warm_up_s: float
    """Requests of this first time are not counted."""
    measured_s: float


class StreamReader:
    """Notes the tokens of one answer as its bytes come. Knows no socket."""

    __slots__ = ("_asked_s", "_done", "_last_s", "_tail", "itl_s", "ttft_s")

    def __init__(self, asked_s: float) -> None:
        self._asked_s = asked_s
        self._last_s = asked_s
        self._tail = b""
        self._done = False
        self.ttft_s: float | None = None
        self.itl_s: list[float] = []

    def feed(self, data: bytes, now_s: float) -> bool:
        """Take in what came at ``now_s``; whether the answer is complete."""
        seen = self._tail + data
        for _ in range(seen.count(EVENT) - self._tail.count(EVENT)):
            if self.ttft_s is None:
                self.ttft_s = now_s - self._asked_s
            else:
                self.itl_s.append(now_s - self._last_s)
            self._last_s = now_s
        self._done = self._done or DONE in seen
        self._tail = seen[-_KEPT:]
        return self._done and seen.endswith(END)


class _Connection(asyncio.Protocol):
    """One connection; asks one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader: StreamReader | None = None
        self._answer: asyncio.Future[StreamReader] | None = None

    async def ask(self, request: bytes) -> StreamReader:
        """The times of the answer, once it is whole.

        Raises:
            TargetError: it is no success, or does not come.
        """
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._reader = StreamReader(time.perf_counter())
        self._transport.write(request)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._answer
        except TimeoutError:
            raise TargetError(f"an answer was not complete after {ANSWER_S:g} s") from None

    def close(self) -> None:
        """Leave."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        reader, answer = self._reader, self._answer
        if reader is None or answer is None or answer.done():
            return
        if reader.ttft_s is None and data.startswith(b"HTTP/") and not data.startswith(OK):
            answer.set_exception(TargetError(f"the answer was {data[:400]!r}"))
        elif reader.feed(data, now_s):
            answer.set_result(reader)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(TargetError(f"the connection broke: {exc}"))


def measure(endpoint: Endpoint, streams: Streams) -> TokenTimes:
    """Run the streams and return what came when.

    Raises:
        TargetError: an answer was no success, or a connection broke.
    """
    try:
        return asyncio.run(_measure(endpoint, streams))
    except* TargetError as failed:
        raise failed.exceptions[0] from None


async def _measure(endpoint: Endpoint, streams: Streams) -> TokenTimes:
    times = TokenTimes()
    pauses = (number * _GOLDEN % 1 * streams.pause_s for number in count(1))
    cpu_s, began = time.process_time(), time.perf_counter()
    begin = began + streams.warm_up_s
    async with asyncio.TaskGroup() as group:
        for _ in range(streams.num):
            group.create_task(_ask_again(endpoint, streams, pauses, begin, times))
    times.client_cpu_s = time.process_time() - cpu_s
    times.wall_s = time.perf_counter() - began
    return times


async def _ask_again(
    endpoint: Endpoint,
    streams: Streams,
    pauses: Iterator[float],
    begin: float,
    times: TokenTimes,
) -> None:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(_Connection, endpoint.host, endpoint.port)
    try:
        while (now := time.perf_counter()) < begin + streams.measured_s:
            if (request := next(streams.requests, None)) is None:
                return
            await asyncio.sleep(next(pauses))
            reader = await connection.ask(request)
            times.num_tokens += 1 + len(reader.itl_s)
            if now >= begin and reader.ttft_s is not None:
                times.ttft_s.append(reader.ttft_s)
                times.itl_s += reader.itl_s
    finally:
        connection.close()
