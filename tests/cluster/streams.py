"""Streams to simulated generators; each of them must be complete."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

BODY = {"model": "sim", "prompt": "a b c", "max_tokens": 25, "stream": True}


def is_complete(stream: str, tokens: int = 25) -> bool:
    return stream.count('"text"') == tokens and stream.endswith("[DONE]\n\n")


class StreamClients:
    """Concurrent streams, repeated until there are to be fewer, and counts of how they ended."""

    def __init__(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self._http = http
        self._body = body
        self._streams: list[asyncio.Task[None]] = []
        self._num_streams = 0
        self.ends: Counter[str] = Counter()

    async def resize(self, num: int) -> None:
        """Add streams, or wait for the end of those that are too many."""
        self._num_streams = num
        for number in range(len(self._streams), num):
            self._streams.append(asyncio.create_task(self._repeat(number)))
        ending, self._streams = self._streams[num:], self._streams[:num]
        await asyncio.gather(*ending)

    async def _repeat(self, number: int) -> None:
        while number < self._num_streams:
            try:
                answer = await self._http.post("/v1/completions", json=self._body)
                complete = is_complete(answer.text, self._body["max_tokens"])
                end = "complete" if complete else f"{answer.status_code}: {answer.text[-200:]}"
            except httpx.HTTPError as error:
                end = repr(error)
                await asyncio.sleep(0.1)
            self.ends[end] += 1


@asynccontextmanager
async def complete_streams(
    url: str, streams: int, tokens: int = 25, model: str = "sim"
) -> AsyncIterator[StreamClients]:
    """Run concurrent streams inside the block; every stream must be complete."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as http:
        clients = StreamClients(http, {**BODY, "model": model, "max_tokens": tokens})
        await clients.resize(streams)
        try:
            yield clients
        finally:
            await clients.resize(0)
    assert set(clients.ends) == {"complete"}, clients.ends


async def until(condition: Callable[[], object], timeout_s: float, event: str) -> None:
    """Wait until ``condition()``, called in a thread, is true."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"{event} took longer than {timeout_s:g} s"
        await asyncio.sleep(0.5)
