"""Measurement of one server with a fixed number of concurrent requests."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import token_times
from benchmarks.endpoint import Endpoint, TargetError, send_request
from benchmarks.rounds import percentile
from benchmarks.token_times import StreamLoad, TokenTimes

PROMPT_TOKENS = 128
COMPLETION_TOKENS = 64
REQUESTS_PER_STREAM = {1: 4, 8: 3}
"""Requests per stream by the number of concurrent streams; 2 for other numbers."""
WARM_UP_REQUESTS = 8
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


def measure(endpoint: Endpoint, prompts: PromptMaker, setting: Setting) -> EngineResult:
    """Warm up, then send all requests with ``setting.concurrent`` at a time.

    Raises:
        TargetError: A response was not 200, or had the wrong number of tokens.
    """
    seed = (setting.round_number, setting.concurrent)
    (prompt,) = prompts.make_prompts(1, "check", *seed)
    check_completion_tokens(send_request(endpoint, _encode(endpoint, prompt, usage=True)))
    warm_up = prompts.make_prompts(min(WARM_UP_REQUESTS, setting.concurrent), "warm-up", *seed)
    _send(endpoint, warm_up, WARM_UP_REQUESTS)
    measured = prompts.make_prompts(setting.num_requests, *seed)
    return _to_result(setting, _send(endpoint, measured, setting.concurrent))


def check_completion_tokens(response: bytes) -> None:
    """Raise ``TargetError`` if a stream's usage is not ``COMPLETION_TOKENS``."""
    found = [int(number) for number in _USAGE.findall(response)]
    if not found or found[-1] != COMPLETION_TOKENS:
        raise TargetError(f"Stream has completion tokens {found[-1:]}, not {COMPLETION_TOKENS}.")


def _encode(endpoint: Endpoint, prompt: str, *, usage: bool = False) -> bytes:
    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": COMPLETION_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        **({"stream_options": {"include_usage": True}} if usage else {}),
    }
    return endpoint.encode_request("/v1/completions", body)


def _send(endpoint: Endpoint, prompts: Sequence[str], concurrent: int) -> TokenTimes:
    requests = iter([_encode(endpoint, prompt) for prompt in prompts])
    load = StreamLoad(requests, concurrent, pause_s=0, warm_up_s=0, measured_s=FOREVER_S)
    return token_times.measure(endpoint, load)


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
