"""Continuous batching as a pure model: what each engine step does, and how long it takes.

Owns the waiting and the running requests and their KV blocks. Never sleeps and starts nothing:
a caller runs ``plan``, lets the step's time pass on its own clock, then runs ``commit``.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.config import SimConfig
from cluster.engines.base import EngineLoad
from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.sim.blocks import BlockPool, block_hashes

MAX_STEP_TOKENS = 2048
"""Tokens in one step (vLLM's max_num_batched_tokens on CPUs); longer prompts take several."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. The caller sets the first three; the rest belongs to the scheduler."""

    tokens: list[int]
    """The prompt's ids; the scheduler appends what is generated."""
    max_tokens: int
    sample: Callable[[], int]
    """Gives the next token id; may set ``stopped``."""
    stopped: bool = False
    """No further token is wanted."""

    num_prompt: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache at the first admission."""
    arrived_s: float = 0.0
    started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    _prefill_left: int = field(default=0, repr=False)
    _capacity: int = field(default=0, repr=False)
    _hashes: list[int] = field(default_factory=list, repr=False)
    _held: list[int] = field(default_factory=list, repr=False)
    _num_private: int = field(default=0, repr=False)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def finish_reason(self) -> str:
        """Why it ended, as vLLM names it."""
        return "stop" if self.stopped else "length"


@dataclass(frozen=True, slots=True)
class Step:
    """What the engine does next."""

    duration_s: float
    samples: list[Request]
    """The requests that get a token at the end of the step."""


class Scheduler:
    """First come, first served; decoding goes before prefill; the latest is preempted first.

    ``prefixes`` is told of each block that is cached or evicted.
    """

    def __init__(
        self,
        config: SimConfig,
        clock: Callable[[], float],
        prefixes: PrefixTracker | None = None,
    ) -> None:
        self.config = config
        on_evicted = prefixes.removed if prefixes is not None else None
        self.blocks = BlockPool(config.num_kv_blocks, on_evicted)
        self._prefixes = prefixes
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._clock = clock

    @property
    def max_request_tokens(self) -> int:
        """The longest request, prompt and completion, that the KV cache can hold."""
        return self.config.num_kv_blocks * self.config.block_size_tokens

    def load(self) -> EngineLoad:
        """The load now."""
        return EngineLoad(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_cache_usage=self.blocks.used / self.blocks.num_blocks,
        )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it has no prompt, asks for no token, or can never fit.
        """
        request.num_prompt = len(request.tokens)
        if not request.tokens or request.max_tokens < 1:
            raise ValueError("a request needs a prompt and max_tokens of at least 1")
        if request.num_prompt + request.max_tokens > self.max_request_tokens:
            raise ValueError(f"a request may hold {self.max_request_tokens} tokens")
        request.arrived_s = self._clock()
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Forget a request and free its blocks; one that has ended is left alone."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self) -> Step | None:
        """Choose the next step; None: there is nothing to do."""
        samples = self._grow_decodes()
        budget = MAX_STEP_TOKENS - len(samples)
        decodes = bool(samples)
        prefilled = 0
        for request in self._prefills():
            chunk = min(request._prefill_left, budget - prefilled)
            if chunk <= 0:
                break
            request._prefill_left -= chunk
            prefilled += chunk
            if not request._prefill_left:
                samples.append(request)
        if not samples and not prefilled:
            return None
        return Step(self._duration(decodes, prefilled), samples)

    def commit(self, step: Step) -> list[Request]:
        """End the step: every request of it that still runs gets its token; returns those ended."""
        now = self._clock()
        ended = []
        for request in step.samples:
            if not request._capacity:  # aborted while the step ran
                continue
            if request.first_token_s is None:
                request.first_token_s = now
                self._share(request, request._hashes)
            request.tokens.append(request.sample())
            if request.stopped or request.num_generated >= request.max_tokens:
                request.finished_s = now
                ended.append(request)
        for request in ended:
            self.running.remove(request)
            self._release(request)
        return ended

    def _duration(self, decodes: bool, prefilled: int) -> float:
        config = self.config
        alone = prefilled * config.prefill_s_per_token + decodes * config.decode_s_per_token
        return alone * (1 + config.batch_slowdown * (len(self.running) - 1))

    def _grow_decodes(self) -> list[Request]:
        """The requests that decode in this step, each with a block for its newest token."""
        samples: list[Request] = []
        preempted = False
        for request in tuple(self.running):
            if request._prefill_left or not request._capacity:
                continue
            if len(request.tokens) > request._capacity:
                num_running = len(self.running)
                grown = self._grow(request)
                preempted |= len(self.running) < num_running
                if not grown:
                    continue
            samples.append(request)
        return [r for r in samples if r._capacity] if preempted else samples

    def _grow(self, request: Request) -> bool:
        """Give ``request`` one block more; False: it was preempted itself."""
        while not self.blocks.take((), 1):
            victim = self.running.pop()
            victim.num_preemptions += 1
            self._release(victim)
            self.waiting.appendleft(victim)
            if victim is request:
                return False
        request._num_private += 1
        request._capacity += self.config.block_size_tokens
        return True

    def _prefills(self) -> list[Request]:
        """Running requests with prompt tokens left, and those that can be admitted now."""
        found = [request for request in self.running if request._prefill_left]
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            if not self._admit(self.waiting[0]):
                break
            request = self.waiting.popleft()
            self.running.append(request)
            found.append(request)
        return found

    def _admit(self, request: Request) -> bool:
        size = self.config.block_size_tokens
        length = len(request.tokens)
        hashes = block_hashes(request.tokens, size)
        # The last token is always computed: its logits give the next one.
        cached = self.blocks.cached_prefix(hashes[: (length - 1) // size])
        num_blocks = -(-length // size)
        if not self.blocks.take(hashes[:cached], num_blocks - cached):
            return False
        request._hashes = hashes
        request._held = hashes[:cached]
        request._num_private = num_blocks - cached
        request._capacity = num_blocks * size
        request._prefill_left = length - cached * size
        if request.started_s is None:
            request.started_s = self._clock()
            request.cached_tokens = cached * size
        return True

    def _share(self, request: Request, hashes: list[int]) -> None:
        fresh = hashes[len(request._held) :]
        turned = self.blocks.share(fresh)
        if turned and self._prefixes is not None:
            parent = request._held[-1] if request._held else None
            start = len(request._held) * self.config.block_size_tokens
            tokens = request.tokens[start : start + turned * self.config.block_size_tokens]
            self._prefixes.stored(fresh[:turned], parent, tokens)
        request._held += fresh[:turned]
        request._num_private -= turned

    def _release(self, request: Request) -> None:
        """Free the blocks; what was computed in full blocks stays cached."""
        if not request._prefill_left and request.first_token_s is not None:
            computed = request.tokens[:-1]
            self._share(request, block_hashes(computed, self.config.block_size_tokens))
        self.blocks.release(request._held, request._num_private)
        request._held, request._num_private = [], 0
        request._capacity = request._prefill_left = 0
