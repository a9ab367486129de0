"""Measurement of one server with a fixed number of concurrent requests."""

import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks import token_times
from benchmarks.endpoint import Endpoint, TargetError, send_request
from benchmarks.rounds import percentile
from benchmarks.token_times import StreamLoad, TokenTimes

PROMPT_TOKENS = 128
COMPLETION_TOKENS = 64
REQUESTS_PER_STREAM = {1: 4, 8: 3}
"""Requests per stream by the number of concurrent streams; 2 for other numbers."""
WARM_UP_REQUESTS = 8
WARM_UP_S, QUICK_WARM_UP_S = 60.0, 5.0
"""Shortest warm-up. The autoscaler may act on a load only after half a minute."""
FOREVER_S = 1e9
SPACE = "Ġ"
"""Character for a leading space in a byte-level vocabulary."""
MIN_LETTERS = 4

_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Random prompts of ``PROMPT_TOKENS`` tokens, made of words that are one token each."""

    words: tuple[str, ...]

    @classmethod
    def from_model(cls, directory: Path) -> "PromptMaker":
        """Use the vocabulary of the model in a directory."""
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        return cls.from_vocabulary(tokenizer["model"]["vocab"])

    @classmethod
    def from_vocabulary(cls, vocabulary: dict[str, int]) -> "PromptMaker":
        """Use the entries that are a space and a plain lower-case word."""
        words = (entry[1:] for entry in vocabulary if entry.startswith(SPACE))
        plain = (word for word in words if word.isascii() and word.isalpha() and word.islower())
        return cls(tuple(sorted(word for word in plain if len(word) >= MIN_LETTERS)))

    def make_prompts(self, num: int, *seed: int | str) -> list[str]:
        """Return ``num`` different prompts; the same seed gives the same prompts."""
        rng = random.Random(repr(seed))
        drawn = (rng.choices(self.words, k=PROMPT_TOKENS) for _ in range(num))
        return ["".join(f" {word}" for word in words) for words in drawn]


@dataclass(frozen=True, slots=True)
class Setting:
    """Parameters of one measurement."""

    round_number: int
    """Part of the seed of the prompts."""
    concurrent: int
    quick: bool

    @property
    def num_requests(self) -> int:
        each = 1 if self.quick else REQUESTS_PER_STREAM.get(self.concurrent, 2)
        return self.concurrent * each


@dataclass(frozen=True, slots=True)
class EngineResult:
    """Throughput and latencies of one measurement. Field names are keys of the JSON file."""

    concurrent: int
    requests: int
    tokens_s: float
    """Completion tokens per second, from the first request to the end of the last response."""
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float


class PromptSender(Protocol):
    """Way to a server: HTTP, or a process with only the engine."""

    def check(self, prompt: str) -> None:
        """Raise ``TargetError`` if the usage of a response is not ``COMPLETION_TOKENS``."""

    def send(self, prompts: Sequence[str], concurrent: int) -> TokenTimes:
        """Send all prompts, ``concurrent`` at a time."""


@dataclass(frozen=True, slots=True)
class HttpSender:
    """Sends prompts to a server's ``/v1/completions``."""

    endpoint: Endpoint

    def check(self, prompt: str) -> None:
        check_completion_tokens(send_request(self.endpoint, self.encode(prompt, usage=True)))

    def send(self, prompts: Sequence[str], concurrent: int) -> TokenTimes:
        requests = iter([self.encode(prompt) for prompt in prompts])
        load = StreamLoad(requests, concurrent, pause_s=0, warm_up_s=0, measured_s=FOREVER_S)
        return token_times.measure(self.endpoint, load)

    def encode(self, prompt: str, *, usage: bool = False) -> bytes:
        """Return the bytes of a request for ``COMPLETION_TOKENS``, streamed."""
        body = {
            "model": self.endpoint.model,
            "prompt": prompt,
            "max_tokens": COMPLETION_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            **({"stream_options": {"include_usage": True}} if usage else {}),
        }
        return self.endpoint.encode_request("/v1/completions", body)


def warm_up(
    sender: PromptSender, prompts: PromptMaker, round_number: int, concurrent: int, seconds: float
) -> None:
    """Send requests for at least ``seconds``, so that the autoscaler acts before the measurement.

    Raises:
        TargetError: A response was not 200, or had the wrong number of tokens.
    """
    (prompt,) = prompts.make_prompts(1, "check", round_number)
    sender.check(prompt)
    began, number = time.monotonic(), 0
    while time.monotonic() - began < seconds or not number:
        number += 1
        seed = ("warm-up", round_number, number)
        sender.send(prompts.make_prompts(concurrent, *seed), concurrent)


def measure(sender: PromptSender, prompts: PromptMaker, setting: Setting) -> EngineResult:
    """Send all requests with ``setting.concurrent`` at a time, after a few others.

    Raises:
        TargetError: A response was not 200.
    """
    seed = (setting.round_number, setting.concurrent)
    num = min(WARM_UP_REQUESTS, setting.concurrent)
    sender.send(prompts.make_prompts(num, "settle", *seed), num)
    measured = prompts.make_prompts(setting.num_requests, *seed)
    return _to_result(setting, sender.send(measured, setting.concurrent))


def check_completion_tokens(response: bytes) -> None:
    """Raise ``TargetError`` if a stream's usage is not ``COMPLETION_TOKENS``."""
    found = [int(number) for number in _USAGE.findall(response)]
    if not found or found[-1] != COMPLETION_TOKENS:
        raise TargetError(f"Stream has completion tokens {found[-1:]}, not {COMPLETION_TOKENS}.")


def _to_result(setting: Setting, times: TokenTimes) -> EngineResult:
    ttft_ms, itl_ms = ([s * 1e3 for s in values] for values in (times.ttft_s, times.itl_s))
    return EngineResult(
        concurrent=setting.concurrent,
        requests=setting.num_requests,
        tokens_s=setting.num_requests * COMPLETION_TOKENS / times.wall_s,
        ttft_ms_p50=percentile(ttft_ms, 50),
        ttft_ms_p99=percentile(ttft_ms, 99),
        itl_ms_p50=percentile(itl_ms, 50),
        itl_ms_p99=percentile(itl_ms, 99),
    )
