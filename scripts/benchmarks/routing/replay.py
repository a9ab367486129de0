"""A trace sent over HTTP, each request when it is due, its answer read as it streams."""

import asyncio
import json
import random
import time
from collections.abc import Mapping

import httpx

from benchmarks.endpoint import TargetError
from cluster.simulation.histogram import Histogram
from cluster.simulation.requests import Trace, TraceRequest

PATH = "/v1/completions"
ANSWER_S = 300.0
"""The longest wait for the next bytes of an answer."""
MAX_WORD = 4096


def prompt(trace: Trace, number: int) -> str:
    """The text of a trace's request: so many tokens of four bytes each for the simulated engine.

    Blocks that are the same in one trace have the same text, others another one.
    """
    request, size = trace.requests[number], trace.block_tokens
    parts = [(f"{trace.name} {block}", size) for block in request.blocks]
    own = request.prompt_tokens - len(parts) * size
    parts.append((f"{trace.name} own {number}", own))
    return "".join(
        f" {word:03x}"
        for seed, tokens in parts
        for word in random.Random(seed).choices(range(MAX_WORD), k=tokens)
    )


class Replay:
    """One replay of a trace, and what its client saw.

    Args:
        url: Of the server, with a prefix of its paths if it has one.
        model: What is asked for.
        headers: Of every request: an API key.
    """

    def __init__(self, url: str, model: str, headers: Mapping[str, str] | None = None) -> None:
        self._url, self._model, self._headers = url, model, dict(headers or {})
        self.ttft_s, self.itl_s = Histogram(), Histogram()
        self.late_s = 0.0
        """By how much the latest request was sent after it was due."""

    async def run(self, trace: Trace) -> None:
        """Send all, and read every answer to its end. A request's id is ``TRACE-NUMBER``.

        Raises:
            TargetError: one was not answered, or not with the tokens that the trace says.
        """
        texts = [prompt(trace, number) for number in range(len(trace.requests))]
        client = httpx.AsyncClient(
            headers=self._headers,
            limits=httpx.Limits(max_connections=None),
            timeout=ANSWER_S,
        )
        try:
            async with client as http, asyncio.TaskGroup() as tasks:
                began_s = time.monotonic()
                for number, request in enumerate(trace.requests):
                    due_s = began_s + request.arrival_s
                    await asyncio.sleep(due_s - time.monotonic())
                    self.late_s = max(self.late_s, time.monotonic() - due_s)
                    sent = self._one(http, f"{trace.name}-{number}", request, texts[number])
                    tasks.create_task(sent)
        except* (TargetError, httpx.HTTPError) as failed:
            raise TargetError(f"{self._url}: {failed.exceptions[0]!r}") from None

    async def _one(
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
        async with http.stream("POST", self._url + PATH, json=body, headers=headers) as answer:
            if answer.status_code != httpx.codes.OK:
                raise TargetError(f"{name}: {answer.status_code} {await answer.aread()!r}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk, now_s = json.loads(line.removeprefix("data: ")), time.monotonic()
                if chunk.get("choices"):
                    gaps_s.append(now_s - last_s)
                    last_s = now_s
                usage = chunk.get("usage") or usage
        taken = usage.get("prompt_tokens"), usage.get("completion_tokens"), len(gaps_s)
        wanted = request.prompt_tokens, request.completion_tokens, request.completion_tokens
        if taken != wanted:
            raise TargetError(f"{name}: prompt, completion tokens, chunks {taken}, not {wanted}")
        self.ttft_s.add(gaps_s[0])
        for gap_s in gaps_s[1:]:
            self.itl_s.add(gap_s)
