"""A replica's engine as a model that jumps: steps that are all alike are one event.

The rules are those of the simulated engine (``cluster.engines.sim.scheduler``): decoding goes
before prefill, which comes in chunks; first come, first served; the latest is preempted first; a
block is shared when the step that computes it begins, and requests are admitted while a step has
room. Tokens are counted and not kept; blocks are those of a trace, which are larger than an
engine's, so KV memory beside them is counted in single tokens. So hours pass in seconds.
Never sleeps: a caller runs ``commit`` when the time is ``due_s``.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from cluster.config import SimConfig
from cluster.engines.sim.blocks import BlockPool
from cluster.engines.sim.scheduler import MAX_STEP_TOKENS
from cluster.load import Load
from cluster.simulation.histogram import Histogram
from cluster.simulation.requests import TraceRequest

_ENDLESS = 2**62


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in an engine. The caller sets the first; the rest belongs to the engine."""

    request: TraceRequest
    generated: int = 0
    """Tokens generated until it last began to decode; see ``Engine.generated``."""
    cached_tokens: int | None = None
    """Prompt tokens that were found in the cache at the first admission."""
    token_s: float | None = None
    """When it got its last token, as far as that is known: the first, or before a preemption."""
    _prefill_left: int = field(default=0, repr=False)
    _held: int = field(default=0, repr=False)
    _private: int = field(default=0, repr=False)
    _joined: int = field(default=-1, repr=False)

    @property
    def length(self) -> int:
        """Prompt tokens and those of ``generated``."""
        return self.request.prompt_tokens + self.generated


class Listener(Protocol):
    """Hears what the requests of an engine come to."""

    def first_token(self, sequence: Sequence, now_s: float) -> None:
        """Its first token is there."""

    def ended(self, sequence: Sequence, now_s: float) -> None:
        """All its tokens are."""


class Engine:
    """Continuous batching of one replica."""

    def __init__(self, config: SimConfig, block_tokens: int, listener: Listener) -> None:
        capacity_tokens = config.num_kv_blocks * config.block_size_tokens
        self.cache = BlockPool(capacity_tokens, block_tokens, self._evicted)
        self.itl_s = Histogram()
        """Seconds between two tokens of a stream."""
        self.due_s = math.inf
        """When the steps under way have ended; inf: there is nothing to do."""
        self.slowdown = 1.0
        """Every step takes so many times as long as it should."""
        self.busy_s = 0.0
        self.coming: dict[int, int] = {}
        """Blocks of requests whose prefill has not ended, and how many requests have each."""
        self._changed: dict[int, bool] = {}
        self._config = config
        self._listener = listener
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._decoding: list[tuple[int, int, Sequence]] = []  # a heap, by the step of the end
        self._num_decoding = 0
        self._num_pushed = 0
        self._steps = 0
        self._begun_s = self._step_s = 0.0
        self._num_steps = self._chunk = self._num_grown = 0

    @property
    def load(self) -> Load:
        """The load now."""
        usage = self.cache.used_tokens / self.cache.capacity_tokens
        running, waiting = len(self._running), len(self._waiting)
        return Load(running, waiting, min(1.0, usage), in_flight=running + waiting)

    @property
    def step(self) -> tuple[float, int]:
        """How long each step under way takes, and how many streams get a token in it."""
        return self._step_s, self._num_decoding

    def generated(self, sequence: Sequence) -> int:
        """Tokens that a request has by now."""
        joined = sequence._joined
        return sequence.generated + (self._steps - joined if joined >= 0 else 0)

    def changes(self) -> tuple[list[int], list[int]]:
        """The blocks stored and removed since the last call."""
        if not self._changed:
            return [], []
        stored = [block for block, cached in self._changed.items() if cached]
        removed = [block for block, cached in self._changed.items() if not cached]
        self._changed = {}
        return stored, removed

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Take in a request.

        Raises:
            ValueError: it can never fit into the cache.
        """
        request = sequence.request
        most = self.cache.capacity_tokens - self._config.block_size_tokens
        if request.prompt_tokens + request.completion_tokens > most:
            raise ValueError(f"a request may hold {most} tokens")
        for block in request.blocks:
            self.coming[block] = self.coming.get(block, 0) + 1
        self._waiting.append(sequence)
        if self.due_s == math.inf:
            self._begin(now_s)
        elif len(self._waiting) == 1 and self._step_s > 0.0:
            self._cut(now_s)

    def commit(self) -> None:
        """End the steps that were under way, and begin the next ones."""
        now_s = self.due_s
        self.busy_s += now_s - self._begun_s
        if self._num_grown:
            self._steps += self._num_steps
            self.cache.private_tokens += self._num_grown * self._num_steps
            self.itl_s.add(self._step_s, self._num_grown * self._num_steps)
        firsts = self._prefilled(self._chunk * self._num_steps)
        while self._decoding and self._decoding[0][0] <= self._steps:
            _, _, sequence = heapq.heappop(self._decoding)
            if sequence._joined >= 0 and self.generated(sequence) >= _completion(sequence):
                self._end(sequence, now_s)
        for sequence in firsts:
            self._token(sequence, now_s)
        self._begin(now_s)

    def stop(self) -> list[Sequence]:
        """Die: returns what it had, and does nothing any more."""
        left = [*self._running, *self._waiting]
        self.due_s = math.inf
        self._waiting.clear()
        self._running.clear()
        return left

    def _cut(self, now_s: float) -> None:
        """End after the step that is under way: somebody came."""
        begun = int((now_s - self._begun_s) / self._step_s) + 1
        if begun < self._num_steps:
            self._num_steps = begun
            self.due_s = self._begun_s + begun * self._step_s

    def _begin(self, now_s: float) -> None:
        """Choose the next steps."""
        self._begun_s = now_s
        num_running = len(self._running)
        while self._num_decoding and self.cache.free_tokens < self._num_decoding:
            self._preempt(now_s)
        num = self._num_decoding
        self._plan_prefill(MAX_STEP_TOKENS - num, admits=len(self._running) == num_running)
        if not self._running:
            self.due_s = math.inf
            return
        steps, self._chunk = self._prefill_steps(MAX_STEP_TOKENS - num)
        if num:
            steps = min(steps, self._next_end() - self._steps, self.cache.free_tokens // num)
            self.cache.add_private(num * steps)  # makes room; what is cut off is not used
            self.cache.private_tokens -= num * steps
        self._num_steps, self._num_grown = max(1, steps), num
        alone = self._chunk * self._config.prefill_s_per_token
        alone += (num > 0) * self._config.decode_s_per_token
        crowd = 1 + self._config.batch_slowdown * (len(self._running) - 1)
        self._step_s = alone * crowd * self.slowdown
        self.due_s = now_s + self._num_steps * self._step_s

    def _plan_prefill(self, budget: int, admits: bool) -> None:
        """Share what the next step computes of prompts, and admit more while it has room."""
        for sequence in self._prefilling:
            budget -= self._schedule(sequence, budget)
        while budget > 0 and admits and self._waiting:
            if len(self._running) == self._config.max_num_seqs or not self._admit(self._waiting[0]):
                return
            sequence = self._waiting.popleft()
            self._running[sequence] = self._prefilling[sequence] = None
            budget -= self._schedule(sequence, budget)

    def _schedule(self, sequence: Sequence, budget: int) -> int:
        """The next step computes the returned number of tokens of a prompt."""
        chunk = max(0, min(sequence._prefill_left, budget))
        self._share(sequence, sequence.length - sequence._prefill_left + chunk)
        return chunk

    def _prefill_steps(self, budget: int) -> tuple[int, int]:
        """How many equal steps of prefill come next, and how many tokens each computes."""
        if not self._prefilling or budget <= 0:
            return _ENDLESS, 0
        head = next(iter(self._prefilling))
        if head._prefill_left > budget:
            return (head._prefill_left - 1) // budget, budget
        chunk = 0
        for sequence in self._prefilling:
            chunk += sequence._prefill_left
            if chunk >= budget:
                return 1, budget
        return 1, chunk

    def _prefilled(self, tokens: int) -> list[Sequence]:
        """Note that so many prompt tokens were computed; returns whose prefill has ended."""
        done = []
        for sequence in self._prefilling:
            chunk = min(tokens, sequence._prefill_left)
            sequence._prefill_left -= chunk
            tokens -= chunk
            if sequence._prefill_left:
                break
            done.append(sequence)
            if not tokens:
                break
        for sequence in done:
            del self._prefilling[sequence]
        return done

    def _token(self, sequence: Sequence, now_s: float) -> None:
        """The prefill of a request has ended, which gives it a token."""
        if sequence.token_s is None:
            self._arrived(sequence.request)
            self._listener.first_token(sequence, now_s)
        else:
            self.itl_s.add(now_s - sequence.token_s)
        sequence.token_s = now_s
        sequence.generated += 1
        if sequence.generated >= _completion(sequence):
            self._end(sequence, now_s)
            return
        sequence._joined = self._steps
        end = self._steps + _completion(sequence) - sequence.generated
        self._num_pushed += 1
        heapq.heappush(self._decoding, (end, self._num_pushed, sequence))
        self._num_decoding += 1

    def _end(self, sequence: Sequence, now_s: float) -> None:
        self._leave(sequence)
        self._share(sequence, sequence.length - 1)  # the last token is not computed
        self._release(sequence)
        self._listener.ended(sequence, now_s)

    def _next_end(self) -> int:
        """The step after which the next stream ends; places of preempted ones are dropped."""
        while True:
            end, _, sequence = self._decoding[0]
            if sequence._joined >= 0 and self._steps + _left(self, sequence) == end:
                return end
            heapq.heappop(self._decoding)

    def _preempt(self, now_s: float) -> None:
        """Put the latest request back to wait; what was computed stays cached while it can."""
        sequence = next(reversed(self._running))
        was_decoding = sequence._joined >= 0
        self._leave(sequence)
        if was_decoding:
            sequence.token_s = now_s
            self._share(sequence, sequence.length - 1)
        self._release(sequence)
        self._waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a request out of what runs."""
        del self._running[sequence]
        self._prefilling.pop(sequence, None)
        if sequence._joined >= 0:
            more = self._steps - sequence._joined
            sequence.generated += more
            sequence._private += more
            sequence._joined = -1
            self._num_decoding -= 1
        sequence._prefill_left = 0

    def _admit(self, sequence: Sequence) -> bool:
        cache, blocks = self.cache, _blocks(sequence)
        held = min(cache.count_cached(blocks), (sequence.length - 1) // cache.block_tokens)
        new = sequence.length - held * cache.block_tokens
        # An engine's last block is half empty, on the average.
        private = new + self._config.block_size_tokens // 2
        if not cache.acquire(blocks[:held], private):
            return False
        sequence._held, sequence._private, sequence._prefill_left = held, private, new
        if sequence.cached_tokens is None:
            sequence.cached_tokens = held * cache.block_tokens
        return True

    def _share(self, sequence: Sequence, num_tokens: int) -> None:
        """Cache the full blocks of the first ``num_tokens``."""
        blocks = _blocks(sequence)[sequence._held : num_tokens // self.cache.block_tokens]
        if not blocks:
            return
        fresh = self.cache.share(blocks)
        for block in blocks[len(blocks) - fresh :]:
            self._changed[block] = True
        sequence._held += len(blocks)
        sequence._private -= len(blocks) * self.cache.block_tokens

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(_blocks(sequence)[: sequence._held], sequence._private)
        sequence._held = sequence._private = 0

    def _evicted(self, blocks: list[int]) -> None:
        for block in blocks:
            self._changed[block] = False

    def _arrived(self, request: TraceRequest) -> None:
        for block in request.blocks:
            self.coming[block] -= 1
            if not self.coming[block]:
                del self.coming[block]


def _completion(sequence: Sequence) -> int:
    return sequence.request.completion_tokens


def _blocks(sequence: Sequence) -> tuple[int, ...]:
    """Those of the prompt, and of the answer where there may be some."""
    request = sequence.request
    return request.blocks + request.answer_blocks if sequence.generated else request.blocks


def _left(engine: Engine, sequence: Sequence) -> int:
    return _completion(sequence) - engine.generated(sequence)
