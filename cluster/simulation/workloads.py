"""Traces that are made from a seed, with the shape of published ones.

Sources, cited where a figure is used:

[M]  Mooncake's traces of an hour of Kimi, ``FAST25-release/traces`` of kvcache-ai/Mooncake, with
     blocks of 512 tokens; the figures were counted in the files.
[MP] The table of these traces in "Mooncake: Trading More Storage for Less Computation" (Qin et
     al., FAST 2025).
[B]  "BurstGPT" (Wang et al., arXiv 2401.17644): gamma gaps, heavy-tailed lengths; the figures are
     those of its conversation log.

What has no source is a guess, and said to be one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.simulation.requests import TraceRequest

MOONCAKE_BLOCK = 512
SMALL_BLOCK = 64
NUM_TENANTS = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal distribution, cut at ``most``."""

    median: float
    sigma: float
    most: float = float("inf")

    def draw(self, rng: np.random.Generator) -> float:
        """One length."""
        return min(self.most, self.median * float(np.exp(self.sigma * rng.standard_normal())))


@dataclass(frozen=True, slots=True)
class Shared:
    """Beginnings of prompts that many have: system prompts, examples, tools."""

    count: int
    zipf: float
    """The n-th most popular one is asked for as often as n to the power of minus this."""
    blocks: Lengths


@dataclass(frozen=True, slots=True)
class Conversations:
    """What conversations are like; a turn's prompt is all that was said before, and more."""

    block_tokens: int
    shared: Shared
    first: Lengths
    """Tokens of the first turn, after what is shared."""
    more: Lengths
    """Tokens that each further turn adds."""
    answer: Lengths
    goes_on: float = 0.0
    """The chance that another turn follows."""
    pause_s: Lengths = Lengths(123.0, 0.9)
    """From one turn to the next [M: 42, 123 and 483 s at 10, 50 and 90 %]."""
    hot_from: float | None = None
    """From this part of the time on, half of the new conversations have one beginning that nobody
    had before."""


CONVERSATION = Conversations(
    # [M] conversation_trace: 12,031 requests, prompts of 12,035 tokens (median 6,909), answers of
    # 343 (median 350, sigma of the logarithm 1.36, 2,000 at most), all with one first block, 39 %
    # go on from another one, 37 % of the blocks were seen before.
    MOONCAKE_BLOCK,
    Shared(1, 0.0, Lengths(1.0, 0.0)),
    first=Lengths(4700.0, 1.15, 126_000.0),
    more=Lengths(2300.0, 1.3, 60_000.0),
    answer=Lengths(270.0, 0.7, 2000.0),
    goes_on=0.4,
)
TOOLAGENT = Conversations(
    # [MP] tool & agent: prompts of 8,596 tokens, answers of 182, 59 % could be cached. How many
    # tools there are and how popular each is are guesses.
    MOONCAKE_BLOCK,
    Shared(150, 1.0, Lengths(5.5, 0.6, 40.0)),
    first=Lengths(1800.0, 1.25, 120_000.0),
    more=Lengths(800.0, 1.0, 20_000.0),
    answer=Lengths(80.0, 1.35, 2000.0),
    goes_on=0.2,
    pause_s=Lengths(8.0, 1.0),
)
FEW_SHOT = Conversations(  # a guess: 64 tasks with 1,500 tokens of examples each, short questions
    SMALL_BLOCK,
    Shared(64, 1.0, Lengths(24.0, 0.5, 100.0)),
    first=Lengths(90.0, 0.7, 2000.0),
    more=Lengths(90.0, 0.7),
    answer=Lengths(60.0, 0.8, 500.0),
)
CHAT = Conversations(
    # [B] prompts of 761 tokens (median 547, deviation 773), answers of 265 (median 232, deviation
    # 222, 2,048 at most). Its prompts hold all earlier turns; sharing and turns are guesses.
    SMALL_BLOCK,
    Shared(16, 1.0, Lengths(4.0, 0.4, 16.0)),
    first=Lengths(130.0, 0.9, 20_000.0),
    more=Lengths(90.0, 0.9, 4000.0),
    answer=Lengths(220.0, 0.6, 2048.0),
    goes_on=0.45,
    pause_s=Lengths(60.0, 0.9),
)


def conversations(
    spec: Conversations, rng: np.random.Generator, starts: list[float], duration_s: float
) -> list[TraceRequest]:
    """All turns before ``duration_s`` of the conversations that begin at ``starts``."""
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
        # The last token that is generated is never computed.
        later = _grown(ids, blocks, (tokens + answer - 1) // spec.block_tokens)
        yield TraceRequest(at, tokens, answer, blocks, later[len(blocks) :], *names)
        if rng.random() >= spec.goes_on:
            return
        blocks, tokens, more = later, tokens + answer, spec.more
        at += spec.pause_s.draw(rng)


def retrieval(
    rng: np.random.Generator, starts: list[float], num_documents: int = 2000
) -> list[TraceRequest]:
    """Instructions, one to four documents in the order of their relevance, a question.

    A document is shared only where all before it are the same. All figures are guesses.
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
