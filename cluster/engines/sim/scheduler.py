"""Continuous batching as a pure model: the work and the duration of each engine step.

The caller runs ``plan``, waits for the step's duration on its own clock, then runs ``commit``.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.config import SimConfig
from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.sim.adapters import AdapterSlots
from cluster.engines.sim.blocks import BlockPool, block_hashes
from cluster.load import Load

MAX_STEP_TOKENS = 2048
"""Tokens per step (vLLM's max_num_batched_tokens on CPUs); longer prompts take several steps."""


@dataclass(slots=True, eq=False)
class SimRequest:
    """One sequence; the caller sets the first five fields, the scheduler owns the rest.

    To continue a sequence, the caller appends what was generated and sets ``num_prompt``.
    """

    tokens: list[int]
    """Token ids of the prompt; the scheduler appends the completion."""
    max_tokens: int
    sample: Callable[[], int]
    """Returns the next token id; may set ``stopped``."""
    stopped: bool = False
    """True if no further token is wanted."""
    adapter: str = ""
    """LoRA adapter of the request."""

    num_prompt: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""
    arrived_s: float = 0.0
    started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    prefill_left: int = field(default=0, repr=False)
    """Tokens that have to be computed before the next token can be sampled."""
    capacity_tokens: int = field(default=0, repr=False)
    """Tokens that fit in the request's blocks; 0 unless it runs."""
    hashes: list[int] = field(default_factory=list, repr=False)
    """Hashes of the full blocks."""
    num_shared: int = field(default=0, repr=False)
    """Leading blocks that are shared through the cache."""

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def finish_reason(self) -> str:
        """Reason for the end of the sequence, as vLLM names it."""
        return "stop" if self.stopped else "length"


@dataclass(frozen=True, slots=True)
class Step:
    """Next step of the engine."""

    duration_s: float
    samples: list[SimRequest]
    """Requests that get a token at the end of the step."""


class Scheduler:
    """Scheduler with vLLM's order: FCFS, decode before prefill, the newest is preempted first.

    As in vLLM, blocks are shared as soon as the step that computes them is planned, and requests
    are admitted while the step has room: equal prompts that arrive together are computed once. A
    request that waits for an adapter slot is overtaken by those that can run.

    Args:
        config: Times and limits.
        clock: Time in seconds.
        prefixes: Gets every block that is cached or evicted.
        adapters: Slots for LoRA adapters.
    """

    def __init__(
        self,
        config: SimConfig,
        clock: Callable[[], float],
        prefixes: PrefixTracker | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.config = config
        on_evicted = prefixes.remove_blocks if prefixes is not None else None
        size = config.block_size_tokens
        self.blocks = BlockPool(config.num_kv_blocks * size, size, on_evicted)
        self._prefixes = prefixes
        self._adapters = adapters or AdapterSlots(1)
        self._num_adapter_loads = 0  # in the current step
        self.waiting: deque[SimRequest] = deque()
        self.running: list[SimRequest] = []
        self._clock = clock

    @property
    def max_request_tokens(self) -> int:
        """Longest request, prompt and completion, that fits in the KV cache."""
        return self.blocks.capacity_tokens

    def load(self) -> Load:
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_cache_usage=self.blocks.used_tokens / self.blocks.capacity_tokens,
            slots=self.config.max_num_seqs,
        )

    def add_request(self, request: SimRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: The request is empty or can never fit.
        """
        request.num_prompt = request.num_prompt or len(request.tokens)
        if not request.tokens or request.max_tokens < 1:
            raise ValueError("a request needs a prompt and max_tokens of at least 1")
        if request.num_prompt + request.max_tokens > self.max_request_tokens:
            raise ValueError(f"a request is limited to {self.max_request_tokens} tokens")
        request.arrived_s = self._clock()
        self.waiting.append(request)

    def abort(self, request: SimRequest) -> None:
        """Remove a request and free its blocks; ignore finished ones."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self) -> Step | None:
        """Return the next step, or None if there is nothing to do."""
        self._num_adapter_loads = 0
        samples, preempted = self._decodes()
        num_decodes = len(samples)
        budget = MAX_STEP_TOKENS - num_decodes
        for request in self._prefills(admits=not preempted) if budget > 0 else ():
            chunk = min(request.prefill_left, budget)
            request.prefill_left -= chunk
            budget -= chunk
            self._share(request, len(request.tokens) - request.prefill_left)
            if not request.prefill_left:
                samples.append(request)
            if not budget:
                break
        prefilled = MAX_STEP_TOKENS - num_decodes - budget
        if not samples and not prefilled:
            return None
        return Step(self._duration(num_decodes > 0, prefilled), samples)

    def commit(self, step: Step) -> list[SimRequest]:
        """End the step: sample a token for each of its requests; return the finished ones."""
        now = self._clock()
        finished = []
        for request in step.samples:
            if not request.capacity_tokens:  # aborted during the step
                continue
            if request.first_token_s is None:
                request.first_token_s = now
            request.tokens.append(request.sample())
            if request.stopped or request.num_generated >= request.max_tokens:
                request.finished_s = now
                finished.append(request)
        for request in finished:
            self.running.remove(request)
            self._release(request)
        return finished

    def _duration(self, decodes: bool, prefilled: int) -> float:
        config = self.config
        single_s = prefilled * config.prefill_s_per_token + decodes * config.decode_s_per_token
        slowdown = 1 + config.batch_slowdown * (len(self.running) - 1)
        return single_s * slowdown + self._num_adapter_loads * config.adapter_load_s

    def _decodes(self) -> tuple[list[SimRequest], bool]:
        """Return the requests that decode, with room for a token, and True if any was preempted."""
        samples: list[SimRequest] = []
        num_running = len(self.running)
        for request in tuple(self.running):
            if request.prefill_left or not request.capacity_tokens:
                continue
            if len(request.tokens) > request.capacity_tokens and not self._grow(request):
                continue
            self._share(request, len(request.tokens))
            samples.append(request)
        if len(self.running) == num_running:
            return samples, False
        return [request for request in samples if request.capacity_tokens], True

    def _grow(self, request: SimRequest) -> bool:
        size = self.config.block_size_tokens
        while not self.blocks.acquire((), size):
            victim = self.running.pop()
            victim.num_preemptions += 1
            self._release(victim)
            self.waiting.appendleft(victim)
            if victim is request:
                return False
        request.capacity_tokens += size
        return True

    def _prefills(self, admits: bool) -> Iterator[SimRequest]:
        """Yield running requests with prefill left, then admit waiting ones one by one."""
        yield from [request for request in self.running if request.prefill_left]
        while admits and self.waiting and len(self.running) < self.config.max_num_seqs:
            can_run = self._adapters.can_run
            request = next((each for each in self.waiting if can_run(each.adapter)), None)
            if request is None or not self._admit(request):
                break
            self.waiting.remove(request)
            self.running.append(request)
            yield request

    def _admit(self, request: SimRequest) -> bool:
        size, length = self.config.block_size_tokens, len(request.tokens)
        request.hashes = self._block_hashes(request)
        # The last token is always computed: its logits give the next token.
        cached = self.blocks.count_cached(request.hashes[: (length - 1) // size])
        capacity = -(-length // size) * size
        if not self.blocks.acquire(request.hashes[:cached], capacity - cached * size):
            return False
        self._num_adapter_loads += self._adapters.acquire(request.adapter)
        request.num_shared = cached
        request.capacity_tokens = capacity
        request.prefill_left = length - cached * size
        if request.started_s is None:
            request.started_s = self._clock()
            request.cached_tokens = cached * size
        return True

    def _share(self, request: SimRequest, num_tokens: int) -> None:
        """Cache the full blocks of the first ``num_tokens``, which this step computes.

        Requests admitted from now on, even in this step, can use them.
        """
        size, shared = self.config.block_size_tokens, request.num_shared
        if num_tokens // size == shared:
            return
        request.hashes = self._block_hashes(request)
        blocks = request.hashes[shared : num_tokens // size]
        request.num_shared += len(blocks)
        fresh = self.blocks.share(blocks)
        if fresh and self._prefixes is not None:
            first = request.num_shared - fresh
            self._prefixes.add_blocks(
                request.hashes[first : request.num_shared],
                request.hashes[first - 1] if first else None,
                request.tokens[first * size : request.num_shared * size],
                request.adapter,
            )

    def _block_hashes(self, request: SimRequest) -> list[int]:
        root = hash(request.adapter) if request.adapter else 0
        size = self.config.block_size_tokens
        return block_hashes(request.tokens, size, request.hashes, root)

    def _release(self, request: SimRequest) -> None:
        """Free the blocks; full blocks that were computed stay cached."""
        shared = request.hashes[: request.num_shared]
        private = request.capacity_tokens - len(shared) * self.config.block_size_tokens
        self.blocks.release(shared, private)
        self._adapters.release(request.adapter)
        request.num_shared = request.capacity_tokens = request.prefill_left = 0
