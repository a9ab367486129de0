"""One server under one number of concurrent requests."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import token_times
from benchmarks.endpoint import Endpoint, TargetError, ask
from benchmarks.engine.prompts import Prompts
from benchmarks.rounds import percentile
from benchmarks.token_times import Streams, TokenTimes

TOKENS = 64
WAVES = {1: 4, 8: 3}
"""Requests for each of the concurrent ones; 2 for other numbers."""
WARM_UP = 8
FOREVER_S = 1e9

_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be measured."""

    number: int
    """Of the round, which its prompts depend on."""
    concurrent: int
    quick: bool

    @property
    def requests(self) -> int:
        """In all."""
        return self.concurrent * (1 if self.quick else WAVES.get(self.concurrent, 2))


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured."""

    concurrent: int
    requests: int
    tokens_s: float
    """Completion tokens, from the first request to the last answer's end."""
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float


def measure(endpoint: Endpoint, prompts: Prompts, wanted: Wanted) -> Cell:
    """Warm up, then send all requests, so many at a time.

    Raises:
        TargetError: an answer was no success, or had another length.
    """
    seed = (wanted.number, wanted.concurrent)
    (checked,) = prompts.some(1, "check", *seed)
    check_usage(ask(endpoint, _request(endpoint, checked, usage=True)))
    _send(endpoint, prompts.some(min(WARM_UP, wanted.concurrent), "warm-up", *seed), WARM_UP)
    times = _send(endpoint, prompts.some(wanted.requests, *seed), wanted.concurrent)
    return _cell(wanted, times)


def check_usage(answer: bytes) -> None:
    """Raise ``TargetError`` where a stream with usage has not the tokens that were asked for."""
    found = [int(number) for number in _USAGE.findall(answer)]
    if not found or found[-1] != TOKENS:
        raise TargetError(f"a stream had {found[-1:]} completion tokens, not {TOKENS}")


def _request(endpoint: Endpoint, prompt: str, *, usage: bool = False) -> bytes:
    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        **({"stream_options": {"include_usage": True}} if usage else {}),
    }
    return endpoint.request("/v1/completions", body)


def _send(endpoint: Endpoint, prompts: Sequence[str], concurrent: int) -> TokenTimes:
    requests = iter([_request(endpoint, prompt) for prompt in prompts])
    streams = Streams(requests, concurrent, pause_s=0, warm_up_s=0, measured_s=FOREVER_S)
    return token_times.measure(endpoint, streams)


def _cell(wanted: Wanted, times: TokenTimes) -> Cell:
    ttft_ms, itl_ms = ([s * 1e3 for s in values] for values in (times.ttft_s, times.itl_s))
    return Cell(
        concurrent=wanted.concurrent,
        requests=wanted.requests,
        tokens_s=wanted.requests * TOKENS / times.wall_s,
        ttft_ms_p50=percentile(ttft_ms, 50),
        ttft_ms_p99=percentile(ttft_ms, 99),
        itl_ms_p50=percentile(itl_ms, 50),
        itl_ms_p99=percentile(itl_ms, 99),
    )
