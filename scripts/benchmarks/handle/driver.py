"""Ray job that calls an engine through Tandem's client or a plain Ray Serve handle.

Runs as ``python -m benchmarks.handle.driver CALLER MODE ADDRESS SECONDS OUT`` and writes its
results to OUT.
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
from benchmarks.targets.running import SIM_MODEL

TOKENS = 128
CONCURRENT = 32
WARM_UP_S = 1.5
PROMPT = "Tell me something."
CHAT = "/v1/chat/completions"


class Caller(Protocol):
    """Four ways to call an engine; each returns the number of tokens received."""

    async def astream(self) -> int:
        """Stream a response."""

    async def aunary(self) -> int:
        """Request a response in one piece."""

    def stream(self) -> Iterator[int]:
        """Stream a response without an event loop; yield the tokens so far at each piece."""

    def unary(self) -> int:
        """Request a response in one piece without an event loop."""


class _ClientCaller:
    def __init__(self) -> None:
        from cluster.client import Tandem

        self._tandem = Tandem()
        self._options: dict[str, Any] = {"model": SIM_MODEL, "max_tokens": TOKENS}

    async def astream(self) -> int:
        pieces = [one async for one in self._tandem.astream(PROMPT, **self._options)]
        return sum(bool(piece.text) for piece in pieces)

    async def aunary(self) -> int:
        return (await self._tandem.achat(PROMPT, **self._options)).usage.completion_tokens

    def stream(self) -> Iterator[int]:
        tokens = 0
        for piece in self._tandem.stream(PROMPT, **self._options):
            tokens += bool(piece.text)
            yield tokens

    def unary(self) -> int:
        return self._tandem.chat(PROMPT, **self._options).usage.completion_tokens


class _HandleCaller:
    def __init__(self) -> None:
        from ray import serve

        from benchmarks.targets.serve_handle import APPLICATION, ENGINE

        self._handle: Any = serve.get_deployment_handle(ENGINE, APPLICATION)
        if not self._handle.is_initialized:  # the driver has no event loop yet
            self._handle._init(_run_router_in_separate_loop=True)
        self._streams = self._handle.options(stream=True)

    async def astream(self) -> int:
        chunks = [one async for one in self._streams.stream.remote(CHAT, _body(stream=True))]
        return sum(map(_count_tokens, chunks))

    async def aunary(self) -> int:
        return _usage_tokens(await self._handle.unary.remote(CHAT, _body(stream=False)))

    def stream(self) -> Iterator[int]:
        tokens = 0
        for chunk in self._streams.stream.remote(CHAT, _body(stream=True)):
            tokens += _count_tokens(chunk)
            yield tokens

    def unary(self) -> int:
        return _usage_tokens(self._handle.unary.remote(CHAT, _body(stream=False)).result())


CALLERS: dict[str, Callable[[], Caller]] = {"client": _ClientCaller, "handle": _HandleCaller}


def _body(*, stream: bool) -> bytes:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": SIM_MODEL, "messages": messages, "max_tokens": TOKENS, "stream": stream}
    return json.dumps(body).encode()


def _count_tokens(chunk: bytes) -> int:
    return chunk.count(b'"content":"') - chunk.count(b'"content":""')


def _usage_tokens(response: bytes) -> int:
    return int(json.loads(response)["usage"]["completion_tokens"])


async def measure_concurrent(caller: Caller, seconds: float) -> dict[str, float]:
    """Return the rates of concurrent calls."""
    streams_s = await _rate(caller.astream, seconds)
    unary_s = await _rate(caller.aunary, seconds)
    return {
        "stream_req_s": streams_s,
        "stream_tokens_s": streams_s * TOKENS,
        "unary_req_s": unary_s,
    }


async def _rate(call: Callable[[], Awaitable[int]], seconds: float) -> float:
    """Return calls per second: the sum of the rates of all concurrent callers."""

    async def call_repeatedly(until: float) -> float:
        began, num = time.perf_counter(), 0
        while time.perf_counter() < until:
            _check(await call())
            num += 1
        return num / (time.perf_counter() - began)

    for length in (WARM_UP_S, seconds):
        until = time.perf_counter() + length
        rates = await asyncio.gather(*(call_repeatedly(until) for _ in range(CONCURRENT)))
    return sum(rates)


def measure_single(caller: Caller, seconds: float) -> dict[str, float]:
    """Return the latencies of consecutive calls in ms."""
    _latencies(caller, WARM_UP_S)
    first, stream, unary = _latencies(caller, seconds)
    return {
        "first_ms_p50": percentile(first, 50) * 1e3,
        "stream_ms_p50": percentile(stream, 50) * 1e3,
        "unary_ms_p50": percentile(unary, 50) * 1e3,
        "unary_ms_p99": percentile(unary, 99) * 1e3,
    }


def _latencies(caller: Caller, seconds: float) -> tuple[list[float], list[float], list[float]]:
    first, stream, unary = [], [], []
    until = time.perf_counter() + 2 * seconds
    while (began := time.perf_counter()) < until:
        tokens, first_s = 0, None
        for tokens in caller.stream():
            first_s = first_s or (tokens and time.perf_counter() - began)
        _check(tokens)
        first.append(first_s or 0.0)
        stream.append(time.perf_counter() - began)
        began = time.perf_counter()
        _check(caller.unary())
        unary.append(time.perf_counter() - began)
    return first, stream, unary


def _check(tokens: int) -> None:
    if tokens != TOKENS:
        raise TargetError(f"Response has {tokens} tokens, expected {TOKENS}.")


def _main(name: str, mode: str, address: str, seconds: float, out: Path) -> None:
    import ray

    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    caller = CALLERS[name]()
    if mode == "concurrent":
        numbers = asyncio.run(measure_concurrent(caller, seconds))
    else:
        numbers = measure_single(caller, seconds)
    out.write_text(json.dumps(numbers), encoding="ascii")


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), Path(sys.argv[5]))
