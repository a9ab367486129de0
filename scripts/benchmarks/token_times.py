"""Client that measures the arrival time of every streamed token.

It has no HTTP parser: it searches for the first bytes of events and for the end of a response, so
each token costs microseconds. The client's CPU time is part of the result.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import cast

from benchmarks.endpoint import LAST_CHUNK, Endpoint, TargetError

EVENT = b"data: {"
DONE = b"data: [DONE]"
RESPONSE_TIMEOUT_S = 180.0
OK = b"HTTP/1.1 200"
_TAIL_BYTES = max(len(DONE), len(LAST_CHUNK)) - 1
_GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples of it, modulo 1, spread evenly


@dataclass(slots=True)
class TokenTimes:
    """Latencies of all requests of a run, in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    """Time from sending a request to its first token, per request."""
    itl_s: list[float] = field(default_factory=list)
    """Gaps between tokens; 0 between tokens of one piece of data."""
    num_tokens: int = 0
    """Tokens of all requests, warm-up included."""
    client_cpu_s: float = 0.0
    """CPU time of the client, warm-up included."""
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """Closed-loop load of concurrent streams."""

    requests: Iterator[bytes]
    """Request bytes in order; the load ends early when they are used up."""
    concurrency: int
    """Concurrent streams; each starts the next request after a complete response and a pause."""
    pause_s: float
    """Longest pause. Pauses are spread evenly from 0, so that requests arrive at every phase of
    the engine's steps."""
    warm_up_s: float
    """Time at the start whose requests do not count."""
    measured_s: float


class StreamReader:
    """Token times of one response, from its bytes. Does no I/O."""

    __slots__ = ("_done", "_last_s", "_sent_s", "_tail", "itl_s", "ttft_s")

    def __init__(self, sent_s: float) -> None:
        self._sent_s = sent_s
        self._last_s = sent_s
        self._tail = b""
        self._done = False
        self.ttft_s: float | None = None
        self.itl_s: list[float] = []

    def feed(self, data: bytes, now_s: float) -> bool:
        """Process data received at ``now_s``; return True if the response is complete."""
        seen = self._tail + data
        for _ in range(seen.count(EVENT) - self._tail.count(EVENT)):
            if self.ttft_s is None:
                self.ttft_s = now_s - self._sent_s
            else:
                self.itl_s.append(now_s - self._last_s)
            self._last_s = now_s
        self._done = self._done or DONE in seen
        self._tail = seen[-_TAIL_BYTES:]
        return self._done and seen.endswith(LAST_CHUNK)


class _StreamConnection(asyncio.Protocol):
    """Connection for one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader: StreamReader | None = None
        self._response: asyncio.Future[StreamReader] | None = None

    async def send(self, request: bytes) -> StreamReader:
        """Send a request and return the times of its complete response.

        Raises:
            TargetError: The response is not 200, or does not arrive in time.
        """
        assert self._transport is not None
        self._response = asyncio.get_running_loop().create_future()
        self._reader = StreamReader(time.perf_counter())
        self._transport.write(request)
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT_S):
                return await self._response
        except TimeoutError:
            raise TargetError(f"No complete response after {RESPONSE_TIMEOUT_S:g} s.") from None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        reader, response = self._reader, self._response
        if reader is None or response is None or response.done():
            return
        if reader.ttft_s is None and data.startswith(b"HTTP/") and not data.startswith(OK):
            response.set_exception(TargetError(f"Response is not 200: {data[:400]!r}"))
        elif reader.feed(data, now_s):
            response.set_result(reader)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_exception(TargetError(f"Connection failed: {exc}"))


def measure(endpoint: Endpoint, load: StreamLoad) -> TokenTimes:
    """Run the load and return the token times.

    Raises:
        TargetError: A response was not 200, or a connection failed.
        OSError: A connection could not be opened.
    """
    try:
        return asyncio.run(_measure(endpoint, load))
    except* (TargetError, OSError) as errors:
        raise errors.exceptions[0] from None


async def _measure(endpoint: Endpoint, load: StreamLoad) -> TokenTimes:
    times = TokenTimes()
    pauses = (number * _GOLDEN_RATIO % 1 * load.pause_s for number in count(1))
    cpu_s, began = time.process_time(), time.perf_counter()
    count_from = began + load.warm_up_s
    async with asyncio.TaskGroup() as group:
        for _ in range(load.concurrency):
            group.create_task(_send_requests(endpoint, load, pauses, count_from, times))
    times.client_cpu_s = time.process_time() - cpu_s
    times.wall_s = time.perf_counter() - began
    return times


async def _send_requests(
    endpoint: Endpoint,
    load: StreamLoad,
    pauses: Iterator[float],
    count_from: float,
    times: TokenTimes,
) -> None:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(_StreamConnection, endpoint.host, endpoint.port)
    try:
        while (now := time.perf_counter()) < count_from + load.measured_s:
            if (request := next(load.requests, None)) is None:
                return
            await asyncio.sleep(next(pauses))
            reader = await connection.send(request)
            times.num_tokens += 1 + len(reader.itl_s)
            if now >= count_from and reader.ttft_s is not None:
                times.ttft_s.append(reader.ttft_s)
                times.itl_s += reader.itl_s
    finally:
        connection.close()
