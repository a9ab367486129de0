"""A Ray job that calls an engine: by Tandem's client, or by a bare handle of Ray Serve.

Runs as ``python -m benchmarks.handle.driver CALLER HOW ADDRESS SECONDS OUT`` and writes what it
measured to OUT. Each caller offers the same four calls, and each call returns the number of
tokens that it got.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from benchmarks.endpoint import TargetError
from benchmarks.rounds import percentile
from benchmarks.targets.running import MODEL

TOKENS = 128
CONCURRENT = 32
WARM_UP_S = 1.5
PROMPT = "Tell me something."
CHAT = "/v1/chat/completions"


class Caller(Protocol):
    """How an engine is called."""

    async def astream(self) -> int:
        """An answer in pieces."""

    async def awhole(self) -> int:
        """An answer as a whole."""

    def stream(self) -> Iterator[int]:
        """``astream`` without an event loop: the tokens so far, at each piece."""

    def whole(self) -> int:
        """``awhole`` without an event loop."""


class _Client:
    """Tandem's client."""

    def __init__(self) -> None:
        from cluster.client import Tandem

        self._tandem = Tandem()
        self._asks: dict[str, Any] = {"model": MODEL, "max_tokens": TOKENS}

    async def astream(self) -> int:
        pieces = [one async for one in self._tandem.astream(PROMPT, **self._asks)]
        return sum(bool(piece.text) for piece in pieces)

    async def awhole(self) -> int:
        return (await self._tandem.achat(PROMPT, **self._asks)).usage.completion_tokens

    def stream(self) -> Iterator[int]:
        tokens = 0
        for piece in self._tandem.stream(PROMPT, **self._asks):
            tokens += bool(piece.text)
            yield tokens

    def whole(self) -> int:
        return self._tandem.chat(PROMPT, **self._asks).usage.completion_tokens


class _Handle:
    """A handle to the engine's deployment."""

    def __init__(self) -> None:
        from ray import serve

        from benchmarks.targets.serve_handle import APPLICATION, ENGINE

        self._whole: Any = serve.get_deployment_handle(ENGINE, APPLICATION)
        if not self._whole.is_initialized:  # a driver has no event loop yet for it to run in
            self._whole._init(_run_router_in_separate_loop=True)
        self._streams = self._whole.options(stream=True)

    async def astream(self) -> int:
        chunks = [one async for one in self._streams.stream.remote(CHAT, _body(stream=True))]
        return sum(map(_tokens_in, chunks))

    async def awhole(self) -> int:
        return _tokens_of(await self._whole.answer.remote(CHAT, _body(stream=False)))

    def stream(self) -> Iterator[int]:
        tokens = 0
        for chunk in self._streams.stream.remote(CHAT, _body(stream=True)):
            tokens += _tokens_in(chunk)
            yield tokens

    def whole(self) -> int:
        return _tokens_of(self._whole.answer.remote(CHAT, _body(stream=False)).result())


CALLERS: dict[str, Callable[[], Caller]] = {"client": _Client, "handle": _Handle}


def _body(*, stream: bool) -> bytes:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "stream": stream}
    return json.dumps(body).encode()


def _tokens_in(chunk: bytes) -> int:
    return chunk.count(b'"content":"') - chunk.count(b'"content":""')


def _tokens_of(answer: bytes) -> int:
    return int(json.loads(answer)["usage"]["completion_tokens"])


async def concurrent(caller: Caller, seconds: float) -> dict[str, float]:
    """The rates of many calls at a time."""
    streams_s = await _rate(caller.astream, seconds)
    whole_s = await _rate(caller.awhole, seconds)
    return {
        "stream_req_s": streams_s,
        "stream_tokens_s": streams_s * TOKENS,
        "unary_req_s": whole_s,
    }


async def _rate(call: Callable[[], Awaitable[int]], seconds: float) -> float:
    """Calls a second: the sum of what each of the concurrent ones had, up to its last answer."""

    async def calls_in_turn(until: float) -> float:
        began, num = time.perf_counter(), 0
        while time.perf_counter() < until:
            _check(await call())
            num += 1
        return num / (time.perf_counter() - began)

    for length in (WARM_UP_S, seconds):
        until = time.perf_counter() + length
        rates = await asyncio.gather(*(calls_in_turn(until) for _ in range(CONCURRENT)))
    return sum(rates)


def single(caller: Caller, seconds: float) -> dict[str, float]:
    """The times of one call after the other, in ms."""
    _times(caller, WARM_UP_S)
    first, stream, whole = _times(caller, seconds)
    return {
        "first_ms_p50": percentile(first, 50) * 1e3,
        "stream_ms_p50": percentile(stream, 50) * 1e3,
        "unary_ms_p50": percentile(whole, 50) * 1e3,
        "unary_ms_p99": percentile(whole, 99) * 1e3,
    }


def _times(caller: Caller, seconds: float) -> tuple[list[float], list[float], list[float]]:
    first, stream, whole = [], [], []
    until = time.perf_counter() + 2 * seconds
    while (began := time.perf_counter()) < until:
        tokens, first_s = 0, None
        for tokens in caller.stream():
            first_s = first_s or (tokens and time.perf_counter() - began)
        _check(tokens)
        first.append(first_s or 0.0)
        stream.append(time.perf_counter() - began)
        began = time.perf_counter()
        _check(caller.whole())
        whole.append(time.perf_counter() - began)
    return first, stream, whole


def _check(tokens: int) -> None:
    if tokens != TOKENS:
        raise TargetError(f"an answer had {tokens} tokens, not {TOKENS}")


def _main(name: str, how: str, address: str, seconds: float, out: Path) -> None:
    import ray

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    caller = CALLERS[name]()
    if how == "concurrent":
        numbers = asyncio.run(concurrent(caller, seconds))
    else:
        numbers = single(caller, seconds)
    out.write_text(json.dumps(numbers), encoding="ascii")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), Path(sys.argv[5]))
