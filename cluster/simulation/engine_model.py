"""Model of a replica's engine that advances many equal steps as one event.

It follows the rules of the simulated engine (``cluster.engines.sim.scheduler``): decoding comes
before prefill, which is chunked; requests are served first come, first served, and the latest one
is preempted first; a block is shared when the step that computes it begins; requests are admitted
while a step has room. Tokens are counted, not stored. Blocks are those of the trace, which are
larger than an engine's, so the KV memory outside of full blocks is counted in tokens. Hours are
simulated in seconds. It never sleeps: the caller calls ``commit`` at ``due_s``.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.config import SimConfig
from cluster.engines.sim.blocks import BlockPool
from cluster.engines.sim.scheduler import MAX_STEP_TOKENS
from cluster.load import Load
from cluster.simulation.histogram import LogHistogram
from cluster.simulation.requests import TraceRequest

_UNLIMITED = 2**62


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in an engine; the caller sets ``request``, the engine everything else."""

    request: TraceRequest
    generated: int = 0
    """Tokens generated before it last began to decode; see ``EngineModel.generated_tokens``."""
    cached_tokens: int | None = None
    """Prompt tokens that were cached at the first admission."""
    token_s: float | None = None
    """Time of its first token, or of its last one before a preemption."""
    _prefill_left: int = field(default=0, repr=False)
    _num_held: int = field(default=0, repr=False)  # shared blocks that it holds
    _private_tokens: int = field(default=0, repr=False)
    _decodes_since: int = field(default=-1, repr=False)  # step; -1 if it does not decode

    @property
    def length(self) -> int:
        return self.request.prompt_tokens + self.generated

    @property
    def is_decoding(self) -> bool:
        """True between its prefill and its end or preemption."""
        return self._decodes_since >= 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of the prompt, and of the answer once there is some."""
        request = self.request
        return request.blocks + request.answer_blocks if self.generated else request.blocks


OnToken = Callable[[Sequence, float], None]
"""Callback with a request and the time of its token."""


class EngineModel:
    """Continuous batching of one replica; calls back at first tokens and at last ones."""

    def __init__(
        self, config: SimConfig, block_tokens: int, on_first_token: OnToken, on_end: OnToken
    ) -> None:
        capacity_tokens = config.num_kv_blocks * config.block_size_tokens
        self.cache = BlockPool(capacity_tokens, block_tokens, self._record_eviction)
        self.itl_s = LogHistogram()
        """Seconds between two tokens of a stream."""
        self.due_s = math.inf
        """End of the steps in progress; inf if the engine is idle."""
        self.slowdown = 1.0
        """Factor on the duration of every step."""
        self.busy_s = 0.0
        self.pending_blocks: Counter[int] = Counter()
        """Number of requests by block, for requests whose prefill has not ended."""
        self._changed_blocks: dict[int, bool] = {}  # True if stored, False if evicted
        self._config = config
        self._on_first_token, self._on_end = on_first_token, on_end
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._num_decoding = 0
        # Heap of (step of the end, number, request); items of preempted requests are stale.
        self._ends: list[tuple[int, int, Sequence]] = []
        self._num_ends = 0
        self._num_steps = 0  # that decoded, ever
        # The steps in progress: number, start, duration of each, prompt and decode tokens of each.
        self._batch_steps = 0
        self._begun_s = self._step_s = 0.0
        self._step_prompt_tokens = self._step_decode_tokens = 0

    @property
    def load(self) -> Load:
        usage = self.cache.used_tokens / self.cache.capacity_tokens
        running, waiting = len(self._running), len(self._waiting)
        return Load(running, waiting, min(1.0, usage), in_flight=running + waiting)

    @property
    def current_step(self) -> tuple[float, int]:
        """Duration of each step in progress, and the number of streams that decode in it."""
        return self._step_s, self._num_decoding

    def generated_tokens(self, sequence: Sequence) -> int:
        decoded = self._num_steps - sequence._decodes_since if sequence.is_decoding else 0
        return sequence.generated + decoded

    def take_block_changes(self) -> tuple[list[int], list[int]]:
        changed, self._changed_blocks = self._changed_blocks, {}
        stored = [block for block, is_stored in changed.items() if is_stored]
        return stored, [block for block, is_stored in changed.items() if not is_stored]

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Add a request.

        Raises:
            ValueError: the request does not fit into the KV cache.
        """
        request = sequence.request
        limit = self.cache.capacity_tokens - self._config.block_size_tokens
        if request.prompt_tokens + request.completion_tokens > limit:
            raise ValueError(f"a request may hold at most {limit} tokens")
        self.pending_blocks.update(request.blocks)
        self._waiting.append(sequence)
        if self.due_s == math.inf:
            self._begin_steps(now_s)
        elif len(self._waiting) == 1 and self._step_s > 0.0:
            self._stop_after_step(now_s)

    def commit(self) -> None:
        """End the steps in progress and begin the next ones."""
        now_s = self.due_s
        self.busy_s += now_s - self._begun_s
        if self._step_decode_tokens:
            decoded_tokens = self._step_decode_tokens * self._batch_steps
            self._num_steps += self._batch_steps
            self.cache.private_tokens += decoded_tokens
            self.itl_s.add(self._step_s, decoded_tokens)
        prefilled = self._advance_prefill(self._step_prompt_tokens * self._batch_steps)
        while self._ends and self._ends[0][0] <= self._num_steps:
            _, _, sequence = heapq.heappop(self._ends)
            if sequence.is_decoding and self._tokens_left(sequence) <= 0:
                self._end(sequence, now_s)
        for sequence in prefilled:
            self._end_prefill(sequence, now_s)
        self._begin_steps(now_s)

    def stop(self) -> None:
        self.due_s = math.inf
        self._waiting.clear()
        self._running.clear()

    # -- steps --

    def _stop_after_step(self, now_s: float) -> None:
        """End after the current step, because a request arrived."""
        num_begun = int((now_s - self._begun_s) / self._step_s) + 1
        if num_begun < self._batch_steps:
            self._batch_steps = num_begun
            self.due_s = self._begun_s + num_begun * self._step_s

    def _begin_steps(self, now_s: float) -> None:
        self._begun_s = now_s
        num_running = len(self._running)
        while self._num_decoding and self.cache.free_tokens < self._num_decoding:
            self._preempt(now_s)
        num_decoding = self._num_decoding
        budget = MAX_STEP_TOKENS - num_decoding
        self._plan_prefill(budget, may_admit=len(self._running) == num_running)
        if not self._running:
            self.due_s = math.inf
            return
        steps, self._step_prompt_tokens = self._equal_prefill_steps(budget)
        if num_decoding:
            until_end = self._next_end() - self._num_steps
            steps = min(steps, until_end, self.cache.free_tokens // num_decoding)
            # Evicts to make room; tokens are counted in ``commit``, as the steps may be cut short.
            self.cache.add_private(num_decoding * steps)
            self.cache.private_tokens -= num_decoding * steps
        self._batch_steps, self._step_decode_tokens = max(1, steps), num_decoding
        alone_s = self._step_prompt_tokens * self._config.prefill_s_per_token
        alone_s += (num_decoding > 0) * self._config.decode_s_per_token
        crowding = 1 + self._config.batch_slowdown * (len(self._running) - 1)
        self._step_s = alone_s * crowding * self.slowdown
        self.due_s = now_s + self._batch_steps * self._step_s

    # -- prefill --

    def _plan_prefill(self, budget: int, may_admit: bool) -> None:
        """Share what the next step computes of prompts; admit requests while it has room."""
        for sequence in self._prefilling:
            budget -= self._plan_chunk(sequence, budget)
        while budget > 0 and may_admit and self._waiting:
            if len(self._running) == self._config.max_num_seqs or not self._admit(self._waiting[0]):
                return
            sequence = self._waiting.popleft()
            self._running[sequence] = self._prefilling[sequence] = None
            budget -= self._plan_chunk(sequence, budget)

    def _plan_chunk(self, sequence: Sequence, budget: int) -> int:
        """Return the prompt tokens that the next step computes, and share their blocks."""
        chunk = max(0, min(sequence._prefill_left, budget))
        self._share(sequence, sequence.length - sequence._prefill_left + chunk)
        return chunk

    def _equal_prefill_steps(self, budget: int) -> tuple[int, int]:
        """Return the number of equal next steps by prefill, and the prompt tokens of each."""
        if not self._prefilling or budget <= 0:
            return _UNLIMITED, 0
        head = next(iter(self._prefilling))
        if head._prefill_left > budget:
            return (head._prefill_left - 1) // budget, budget
        chunk = 0
        for sequence in self._prefilling:
            chunk += sequence._prefill_left
            if chunk >= budget:
                return 1, budget
        return 1, chunk

    def _advance_prefill(self, tokens: int) -> list[Sequence]:
        """Distribute computed prompt tokens; return the requests whose prefill has ended."""
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

    def _end_prefill(self, sequence: Sequence, now_s: float) -> None:
        """Give a request the token that its prefill brings, and let it decode."""
        if sequence.token_s is None:
            self._remove_pending(sequence.request)
            self._on_first_token(sequence, now_s)
        else:
            self.itl_s.add(now_s - sequence.token_s)
        sequence.token_s = now_s
        sequence.generated += 1
        if self._tokens_left(sequence) <= 0:
            self._end(sequence, now_s)
            return
        sequence._decodes_since = self._num_steps
        self._num_ends += 1
        end = self._num_steps + self._tokens_left(sequence)
        heapq.heappush(self._ends, (end, self._num_ends, sequence))
        self._num_decoding += 1

    # -- decoding --

    def _tokens_left(self, sequence: Sequence) -> int:
        return sequence.request.completion_tokens - self.generated_tokens(sequence)

    def _next_end(self) -> int:
        """Return the step after which the next stream ends; drop stale items on the way."""
        while True:
            end, _, sequence = self._ends[0]
            if sequence.is_decoding and self._num_steps + self._tokens_left(sequence) == end:
                return end
            heapq.heappop(self._ends)

    def _end(self, sequence: Sequence, now_s: float) -> None:
        self._stop_running(sequence)
        self._share(sequence, sequence.length - 1)  # the last token is not computed
        self._release(sequence)
        self._on_end(sequence, now_s)

    def _preempt(self, now_s: float) -> None:
        """Return the latest request to the queue; its blocks stay cached until evicted."""
        sequence = next(reversed(self._running))
        was_decoding = sequence.is_decoding
        self._stop_running(sequence)
        if was_decoding:
            sequence.token_s = now_s
            self._share(sequence, sequence.length - 1)
        self._release(sequence)
        self._waiting.appendleft(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        del self._running[sequence]
        self._prefilling.pop(sequence, None)
        if sequence.is_decoding:
            decoded = self._num_steps - sequence._decodes_since
            sequence.generated += decoded
            sequence._private_tokens += decoded
            sequence._decodes_since = -1
            self._num_decoding -= 1
        sequence._prefill_left = 0

    # -- KV cache --

    def _admit(self, sequence: Sequence) -> bool:
        """Reserve KV memory for a request; return False if there is too little."""
        cache, blocks = self.cache, sequence.blocks
        held = min(cache.count_cached(blocks), (sequence.length - 1) // cache.block_tokens)
        new_tokens = sequence.length - held * cache.block_tokens
        # An engine's last block is half empty on average.
        private_tokens = new_tokens + self._config.block_size_tokens // 2
        if not cache.acquire(blocks[:held], private_tokens):
            return False
        sequence._num_held, sequence._private_tokens = held, private_tokens
        sequence._prefill_left = new_tokens
        if sequence.cached_tokens is None:
            sequence.cached_tokens = held * cache.block_tokens
        return True

    def _share(self, sequence: Sequence, num_tokens: int) -> None:
        """Cache the full blocks of a request's first ``num_tokens``."""
        blocks = sequence.blocks[sequence._num_held : num_tokens // self.cache.block_tokens]
        if not blocks:
            return
        num_new = self.cache.share(blocks)
        self._changed_blocks |= dict.fromkeys(blocks[len(blocks) - num_new :], True)
        sequence._num_held += len(blocks)
        sequence._private_tokens -= len(blocks) * self.cache.block_tokens

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.blocks[: sequence._num_held], sequence._private_tokens)
        sequence._num_held = sequence._private_tokens = 0

    def _record_eviction(self, blocks: list[int]) -> None:
        self._changed_blocks |= dict.fromkeys(blocks, False)

    def _remove_pending(self, request: TraceRequest) -> None:
        for block in request.blocks:
            self.pending_blocks[block] -= 1
            if not self.pending_blocks[block]:
                del self.pending_blocks[block]
