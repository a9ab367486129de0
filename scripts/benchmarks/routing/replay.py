"""Replay of a trace over HTTP: each request is sent at its arrival time and streamed."""

import asyncio
import json
import random
import time
from collections.abc import Mapping

import httpx

from benchmarks.endpoint import TargetError
from cluster.simulation.histogram import LogHistogram
from cluster.simulation.requests import Trace, TraceRequest

PATH = "/v1/completions"
READ_TIMEOUT_S = 300.0
"""Longest wait for the next bytes of a response."""
NUM_WORDS = 4096
"""Distinct words; each has four bytes with its space, which are one simulated token."""


def make_prompt(trace: Trace, number: int) -> str:
    """Return the text of a request: four bytes per token for the simulated engine.

    Equal blocks of a trace have equal text, different blocks have different text.
    """
    request, size = trace.requests[number], trace.block_tokens
    parts = [(f"{trace.name} {block}", size) for block in request.blocks]
    rest = request.prompt_tokens - len(parts) * size
    parts.append((f"{trace.name} own {number}", rest))
    return "".join(
        f" {word:03x}"
        for seed, tokens in parts
        for word in random.Random(seed).choices(range(NUM_WORDS), k=tokens)
    )


class Replay:
    """Client that replays a trace and measures latencies.

    Args:
        url: Base URL of the server, including a route prefix if there is one.
        model: Model of every request.
        headers: Headers of every request, such as an API key.
    """

    def __init__(self, url: str, model: str, headers: Mapping[str, str] | None = None) -> None:
        self._url, self._model, self._headers = url, model, dict(headers or {})
        self.ttft_s, self.itl_s = LogHistogram(), LogHistogram()
        self.late_s = 0.0
        """Largest delay between a request's arrival time and its sending."""

    async def run(self, trace: Trace) -> None:
        """Send all requests and read the complete responses. Request ids are ``TRACE-NUMBER``.

        Raises:
            TargetError: A request failed, or its token counts differ from the trace's.
        """
        texts = [make_prompt(trace, number) for number in range(len(trace.requests))]
        client = httpx.AsyncClient(
            headers=self._headers,
            limits=httpx.Limits(max_connections=None),
            timeout=READ_TIMEOUT_S,
        )
        try:
            async with client as http, asyncio.TaskGroup() as tasks:
                began_s = time.monotonic()
                for number, request in enumerate(trace.requests):
                    due_s = began_s + request.arrival_s
                    await asyncio.sleep(due_s - time.monotonic())
                    self.late_s = max(self.late_s, time.monotonic() - due_s)
                    send = self._send(http, f"{trace.name}-{number}", request, texts[number])
                    tasks.create_task(send)
        except* (TargetError, httpx.HTTPError) as errors:
            raise TargetError(f"{self._url}: {errors.exceptions[0]!r}") from None

    async def _send(
        self, http: httpx.AsyncClient, name: str, request: TraceRequest, text: str
    ) -> None:
        body = {
            "model": self._model,
            "prompt": text,
            "max_tokens": request.completion_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"x-request-id": name}
        if request.session is not None:
            headers["x-session-id"] = request.session
        gaps_s: list[float] = []
        usage: dict[str, int] = {}
        last_s = time.monotonic()
        async with http.stream("POST", self._url + PATH, json=body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise TargetError(f"{name}: {response.status_code} {await response.aread()!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk, now_s = json.loads(line.removeprefix("data: ")), time.monotonic()
                if chunk.get("choices"):
                    gaps_s.append(now_s - last_s)
                    last_s = now_s
                usage = chunk.get("usage") or usage
        actual = usage.get("prompt_tokens"), usage.get("completion_tokens"), len(gaps_s)
        expected = request.prompt_tokens, request.completion_tokens, request.completion_tokens
        if actual != expected:
            raise TargetError(
                f"{name}: prompt tokens, completion tokens, chunks: {actual}, not {expected}"
            )
        self.ttft_s.add(gaps_s[0])
        for gap_s in gaps_s[1:]:
            self.itl_s.add(gap_s)
