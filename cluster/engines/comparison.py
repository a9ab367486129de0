"""Comparison of two generators on the same texts: likelihood, greedy tokens and speed.

Both run at the same time, and the rounds alternate between them, so that other load of the machine
affects both alike. Engines are asked over their own HTTP application, as a router asks them.
"""

import asyncio
import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.config import GeneratorConfig
from cluster.engines.base import Engine
from cluster.engines.factory import make_generator_engine
from cluster.engines.vllm.environment import Environment
from cluster.errors import BuildError, ConfigError
from cluster.models.quantize import weights_bytes
from cluster.models.store import Progress

CONCURRENCIES = (1, 8, 32)
NUM_ROUNDS = 5
COMPLETION_TOKENS = 32
"""Length of each answer in the measurement of the speed."""
PROMPT_TOKENS = 24
MAX_TEXT_TOKENS = 512
"""Length to which texts are cut."""
KV_CACHE_BYTES = 256 * 1024**2  # holds 32 requests of a small model; two engines share the memory
TIMEOUT_S = 600.0
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""Variables that keep vLLM's warnings out of the command's output."""
Tokens = list[int]


@dataclass(frozen=True, slots=True)
class TextScore:
    """A model's view of one text."""

    logprobs: list[float]
    """Natural logarithm of the probability of each token but the first."""
    best: Tokens
    """Most likely token at each of these positions."""


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """Figures of one of the models."""

    model: str
    size_bytes: int
    perplexity: float
    tokens_per_s: dict[int, float]
    """Median over the rounds, by the number of concurrent requests."""
    tokens_per_s_range: dict[int, tuple[float, float]]
    """Slowest and fastest round."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of comparing two generators."""

    a: ModelFigures
    b: ModelFigures
    num_tokens: int
    """Tokens that both models predicted."""
    agreement: float
    """Share of positions of the texts at which both models find the same token most likely."""


class Candidate:
    """One of the compared models, running."""

    def __init__(self, model: str, size_bytes: int, engine: Engine) -> None:
        self.model = model
        self.size_bytes = size_bytes
        self.rates: dict[int, list[float]] = {}
        """Tokens per second of each round, by concurrency."""
        transport = httpx.ASGITransport(app=engine.app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://engine")

    async def tokenize(self, text: str) -> Tokens:
        reply = await self._post("/tokenize", {"prompt": text})
        tokens: Tokens = reply["tokens"][:MAX_TEXT_TOKENS]
        return tokens

    async def score(self, tokens: Tokens) -> TextScore:
        fields = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        reply = await self._post("/v1/completions", fields)
        logprobs, best = [], []
        # One object by token id per position: the text's token and the most likely one.
        for token, options in zip(
            tokens[1:], reply["choices"][0]["prompt_logprobs"][1:], strict=True
        ):
            logprobs.append(float(options[str(token)]["logprob"]))
            best.append(int(max(options, key=lambda one: options[one]["logprob"])))
        return TextScore(logprobs, best)

    async def measure_rate(self, prompts: Sequence[Tokens]) -> float:
        """Answer all prompts at the same time; return the completion tokens per second."""
        fields = {"max_tokens": COMPLETION_TOKENS, "temperature": 0, "ignore_eos": True}
        started = time.perf_counter()
        replies = await asyncio.gather(
            *(self._post("/v1/completions", {"prompt": one, **fields}) for one in prompts)
        )
        taken_s = time.perf_counter() - started
        tokens: int = sum(reply["usage"]["completion_tokens"] for reply in replies)
        return tokens / taken_s

    def figures(self, scores: Sequence[TextScore]) -> ModelFigures:
        logprobs = [value for score in scores for value in score.logprobs]
        return ModelFigures(
            self.model,
            self.size_bytes,
            math.exp(-statistics.fmean(logprobs)),
            {count: statistics.median(rates) for count, rates in self.rates.items()},
            {count: (min(rates), max(rates)) for count, rates in self.rates.items()},
        )

    async def _post(self, path: str, fields: dict[str, Any]) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            reply = await self._client.post(path, json=fields)
        if reply.status_code != httpx.codes.OK:
            raise BuildError(f"{self.model}: {path} answers {reply.status_code}: {reply.text}")
        return reply.json()


async def compare_generators(
    models: tuple[str, str],
    directories: tuple[Path, Path],
    texts: Sequence[str],
    progress: Progress = lambda message, fraction: None,
) -> Comparison:
    """Start both models, compare them on the texts, and stop them.

    Raises:
        ConfigError: vLLM cannot serve one of them here, or their tokens differ.
        EngineDeadError: an engine ended.
    """
    environment = Environment()
    environment.set_defaults(QUIET)
    async with AsyncExitStack() as stack:
        stack.callback(environment.restore)
        candidates = []
        for model, directory in zip(models, directories, strict=True):
            progress(f"starting {model}", None)
            engine = make_generator_engine(_config(model, directory))
            stack.push_async_callback(engine.stop)
            await engine.start()
            candidates.append(Candidate(model, weights_bytes(directory), engine))
        # vLLM may log the end of its engine, which ``stop`` causes, as an error with a traceback.
        logger = logging.getLogger("vllm")
        stack.callback(logger.setLevel, logger.level)
        stack.callback(logger.setLevel, logging.CRITICAL)
        return await compare(candidates[0], candidates[1], texts, progress)


async def compare(
    a: Candidate, b: Candidate, texts: Sequence[str], progress: Progress
) -> Comparison:
    """Compare two running models.

    Raises:
        ConfigError: they divide the texts into different tokens, or no text has two.
    """
    tokens = [await a.tokenize(text) for text in texts]
    if tokens != [await b.tokenize(text) for text in texts]:
        raise ConfigError(
            f"{a.model} and {b.model} have different tokenizers; perplexity and agreement are "
            "comparable only between versions of one model"
        )
    tokens = [one for one in tokens if len(one) > 1]
    if not tokens:
        raise ConfigError("no text has two tokens, of which one could predict the other")
    scores: tuple[list[TextScore], list[TextScore]] = [], []
    for index, one in enumerate(tokens):
        progress("measuring the perplexity", index / len(tokens))
        scores[0].append(await a.score(one))
        scores[1].append(await b.score(one))
    prompts = _prompts(tokens)
    for index in range(NUM_ROUNDS + 1):
        for count in CONCURRENCIES:
            progress("measuring the speed", index / (NUM_ROUNDS + 1))
            chosen = [next(prompts) for _ in range(count)]
            for model in (a, b):
                rate = await model.measure_rate(chosen)
                if index:  # kernels prepare themselves for each size in the first round
                    model.rates.setdefault(count, []).append(rate)
    equal = [
        x == y
        for left, right in zip(*scores, strict=True)
        for x, y in zip(left.best, right.best, strict=True)
    ]
    return Comparison(
        a.figures(scores[0]), b.figures(scores[1]), len(equal), statistics.fmean(equal)
    )


def _prompts(texts: Sequence[Tokens]) -> Iterator[Tokens]:
    """Yield short prompts without end, different for a while."""
    start = 0
    while True:
        for text in texts:
            part = text[start % len(text) :][:PROMPT_TOKENS]
            yield part
        start += PROMPT_TOKENS // 2


def _config(model: str, directory: Path) -> GeneratorConfig:
    return GeneratorConfig.model_validate(
        {
            "name": "compared",
            "model": str(directory),
            "max_model_len": MAX_TEXT_TOKENS + COMPLETION_TOKENS,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "tool_call_parser": "none",
            "reasoning_parser": "none",
        }
    )
