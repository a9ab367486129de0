"""Workloads made from a seed, with the shape of published traces.

Sources of the figures:

[M]  Mooncake's traces of one hour of Kimi (kvcache-ai/Mooncake, ``FAST25-release/traces``), with
     blocks of 512 tokens; counted in the files.
[MP] Table of these traces in "Mooncake: Trading More Storage for Less Computation" (Qin et al.,
     FAST 2025).
[B]  "BurstGPT" (Wang et al., arXiv 2401.17644), conversation log: gamma-distributed gaps,
     heavy-tailed lengths.

Figures without a source are guesses and marked as such.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.simulation.requests import TraceRequest
from cluster.simulation.trace_files import MOONCAKE_BLOCK

SMALL_BLOCK = 64
NUM_TENANTS = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal distribution of lengths, cut at ``maximum``."""

    median: float
    sigma: float
    maximum: float = float("inf")

    def draw(self, rng: np.random.Generator) -> float:
        return min(self.maximum, self.median * float(np.exp(self.sigma * rng.standard_normal())))


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Prefixes that many prompts share: system prompts, examples, tools."""

    count: int
    zipf: float
    """Exponent: the n-th most popular prefix has a weight of n ** -zipf."""
    blocks: Lengths


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations; the prompt of a turn is the whole conversation so far plus new tokens."""

    block_tokens: int
    shared: SharedPrefixes
    first: Lengths
    """New tokens of the first turn, after the shared prefix."""
    more: Lengths
    """New tokens of each further turn."""
    answer: Lengths
    continues: float = 0.0
    """Probability that another turn follows."""
    pause_s: Lengths = Lengths(123.0, 0.9)
    """Time between two turns [M: 42, 123 and 483 s at 10, 50 and 90 %]."""
    hot_from: float | None = None
    """Share of the duration after which half of the new conversations share a new prefix."""


CONVERSATION = Conversations(
    # [M] conversation_trace: 12,031 requests, prompts of 12,035 tokens (median 6,909), answers of
    # 343 (median 350, sigma of the logarithm 1.36, 2,000 at most), all with one first block, 39 %
    # continue another one, 37 % of the blocks were seen before.
    MOONCAKE_BLOCK,
    SharedPrefixes(1, 0.0, Lengths(1.0, 0.0)),
    first=Lengths(4700.0, 1.15, 126_000.0),
    more=Lengths(2300.0, 1.3, 60_000.0),
    answer=Lengths(270.0, 0.7, 2000.0),
    continues=0.4,
)
TOOLAGENT = Conversations(
    # [MP] tool & agent: prompts of 8,596 tokens, answers of 182, 59 % could be cached. The number
    # of tools and their popularity are guesses.
    MOONCAKE_BLOCK,
    SharedPrefixes(150, 1.0, Lengths(5.5, 0.6, 40.0)),
    first=Lengths(1800.0, 1.25, 120_000.0),
    more=Lengths(800.0, 1.0, 20_000.0),
    answer=Lengths(80.0, 1.35, 2000.0),
    continues=0.2,
    pause_s=Lengths(8.0, 1.0),
)
FEW_SHOT = Conversations(  # a guess: 64 tasks with 1,500 tokens of examples each, short questions
    SMALL_BLOCK,
    SharedPrefixes(64, 1.0, Lengths(24.0, 0.5, 100.0)),
    first=Lengths(90.0, 0.7, 2000.0),
    more=Lengths(90.0, 0.7),
    answer=Lengths(60.0, 0.8, 500.0),
)
CHAT = Conversations(
    # [B] prompts of 761 tokens (median 547, deviation 773), answers of 265 (median 232, deviation
    # 222, 2,048 at most). Prompts include all earlier turns; sharing and turns are guesses.
    SMALL_BLOCK,
    SharedPrefixes(16, 1.0, Lengths(4.0, 0.4, 16.0)),
    first=Lengths(130.0, 0.9, 20_000.0),
    more=Lengths(90.0, 0.9, 4000.0),
    answer=Lengths(220.0, 0.6, 2048.0),
    continues=0.45,
    pause_s=Lengths(60.0, 0.9),
)


def conversations(
    spec: Conversations, rng: np.random.Generator, starts: list[float], duration_s: float
) -> list[TraceRequest]:
    """Return all turns before ``duration_s`` of conversations that begin at ``starts``, sorted."""
    ids = itertools.count(1)
    shared = [
        _ids(ids, max(1, round(spec.shared.blocks.draw(rng)))) for _ in range(spec.shared.count)
    ]
    picks = _zipf(rng, spec.shared.count, spec.shared.zipf, len(starts))
    tenants = _zipf(rng, NUM_TENANTS, 1.0, len(starts))
    hot = _ids(ids, max(2, 8192 // spec.block_tokens))
    made: list[TraceRequest] = []
    for number, start in enumerate(starts):
        is_hot = spec.hot_from is not None and start >= spec.hot_from * duration_s
        blocks = hot if is_hot and rng.random() < 0.5 else shared[picks[number]]
        names = f"s{number}", f"t{tenants[number]}"
        made += _turns(spec, rng, ids, blocks, (start, duration_s), names)
    return sorted(made, key=lambda request: request.arrival_s)


def _turns(
    spec: Conversations,
    rng: np.random.Generator,
    ids: Iterator[int],
    blocks: tuple[int, ...],
    span: tuple[float, float],
    names: tuple[str, str],
) -> Iterator[TraceRequest]:
    at, end = span
    tokens = len(blocks) * spec.block_tokens
    more = spec.first
    while at < end:
        tokens += max(1, round(more.draw(rng)))
        answer = max(1, round(spec.answer.draw(rng)))
        blocks = _grown(ids, blocks, tokens // spec.block_tokens)
        # The last generated token is never computed.
        later = _grown(ids, blocks, (tokens + answer - 1) // spec.block_tokens)
        yield TraceRequest(at, tokens, answer, blocks, later[len(blocks) :], *names)
        if rng.random() >= spec.continues:
            return
        blocks, tokens, more = later, tokens + answer, spec.more
        at += spec.pause_s.draw(rng)


def retrieval(
    rng: np.random.Generator, starts: list[float], num_documents: int = 2000
) -> list[TraceRequest]:
    """Return requests of instructions, one to four documents by relevance, and a question.

    A document is shared only if everything before it is the same. All figures are guesses.
    """
    ids = itertools.count(1)
    instructions = _ids(ids, 4)
    children: dict[tuple[int, int], tuple[int, ...]] = {}
    sizes = [max(2, round(Lengths(10.0, 0.5, 40.0).draw(rng))) for _ in range(num_documents)]
    firsts = _zipf(rng, num_documents, 1.0, 4 * len(starts))
    counts = rng.integers(1, 5, len(starts))
    made = []
    for number, start in enumerate(starts):
        blocks = instructions
        for document in firsts[4 * number : 4 * number + counts[number]]:
            key = (blocks[-1], int(document))
            if key not in children:
                children[key] = _ids(ids, sizes[document])
            blocks += children[key]
        tokens = len(blocks) * SMALL_BLOCK + max(1, round(Lengths(40.0, 0.6, 400.0).draw(rng)))
        blocks = _grown(ids, blocks, tokens // SMALL_BLOCK)
        answer = max(1, round(Lengths(150.0, 0.7, 1000.0).draw(rng)))
        made.append(TraceRequest(start, tokens, answer, blocks, (), f"s{number}"))
    return made


def _ids(ids: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(itertools.islice(ids, count))


def _grown(ids: Iterator[int], blocks: tuple[int, ...], count: int) -> tuple[int, ...]:
    return blocks + _ids(ids, count - len(blocks))


def _zipf(rng: np.random.Generator, kinds: int, exponent: float, count: int) -> list[int]:
    weights = np.arange(1, kinds + 1, dtype=float) ** -exponent
    return [int(i) for i in rng.choice(kinds, size=count, p=weights / weights.sum())]
