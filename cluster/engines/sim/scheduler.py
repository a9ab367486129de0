"""Continuous batching as a pure model: what each engine step does, and how long it takes.

Owns the waiting and the running requests and their KV blocks. Never sleeps and starts nothing:
a caller runs ``plan``, lets the step's time pass on its own clock, then runs ``commit``.
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
"""Tokens in one step (vLLM's max_num_batched_tokens on CPUs); longer prompts take several."""


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. The caller sets the first five; the rest belongs to the scheduler."""

    tokens: list[int]
    """The prompt's ids; the scheduler appends what is generated."""
    max_tokens: int
    sample: Callable[[], int]
    """Gives the next token id; may set ``stopped``."""
    stopped: bool = False
    """No further token is wanted."""
    adapter: str = ""
    """The LoRA adapter that it needs."""

    num_prompt: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache at the first admission."""
    arrived_s: float = 0.0
    started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_preemptions: int = 0
    _prefill_left: int = field(default=0, repr=False)
    _capacity: int = field(default=0, repr=False)  # tokens that its blocks hold
    _hashes: list[int] = field(default_factory=list, repr=False)
    _num_held: int = field(default=0, repr=False)

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

    Blocks are shared when the step that computes them is planned, and requests are admitted while
    the step has room, so equal prompts that come together are computed once, as by vLLM. So is it
    that a request for an adapter that finds no slot is passed by those that need none or another.

    ``prefixes`` is told of each block that is cached or evicted.
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
        self._num_loaded = 0
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._clock = clock

    @property
    def max_request_tokens(self) -> int:
        """The longest request, prompt and completion, that the KV cache can hold."""
        return self.blocks.capacity_tokens

    def load(self) -> Load:
        """The load now."""
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_cache_usage=self.blocks.used_tokens / self.blocks.capacity_tokens,
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
        self._num_loaded = 0
        samples, preempted = self._decodes()
        num_decodes = len(samples)
        left = MAX_STEP_TOKENS - num_decodes
        for request in self._prefills(admits=not preempted) if left > 0 else ():
            chunk = min(request._prefill_left, left)
            request._prefill_left -= chunk
            left -= chunk
            self._share(request, len(request.tokens) - request._prefill_left)
            if not request._prefill_left:
                samples.append(request)
            if not left:
                break
        prefilled = MAX_STEP_TOKENS - num_decodes - left
        if not samples and not prefilled:
            return None
        return Step(self._duration(num_decodes > 0, prefilled), samples)

    def commit(self, step: Step) -> list[Request]:
        """End the step: every request of it that still runs gets its token; returns those ended."""
        now = self._clock()
        ended = []
        for request in step.samples:
            if not request._capacity:  # aborted while the step ran
                continue
            if request.first_token_s is None:
                request.first_token_s = now
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
        crowd = 1 + config.batch_slowdown * (len(self.running) - 1)
        return alone * crowd + self._num_loaded * config.adapter_load_s

    def _decodes(self) -> tuple[list[Request], bool]:
        """The requests that decode, each with room for a token, and whether any was preempted."""
        samples: list[Request] = []
        num_running = len(self.running)
        for request in tuple(self.running):
            if request._prefill_left or not request._capacity:
                continue
            if len(request.tokens) > request._capacity and not self._grow(request):
                continue
            self._share(request, len(request.tokens))
            samples.append(request)
        if len(self.running) == num_running:
            return samples, False
        return [request for request in samples if request._capacity], True

    def _grow(self, request: Request) -> bool:
        """Give ``request`` one block more; False: it was preempted itself."""
        size = self.config.block_size_tokens
        while not self.blocks.acquire((), size):
            victim = self.running.pop()
            victim.num_preemptions += 1
            self._release(victim)
            self.waiting.appendleft(victim)
            if victim is request:
                return False
        request._capacity += size
        return True

    def _prefills(self, admits: bool) -> Iterator[Request]:
        """Running requests with prompt tokens left, then those that can be admitted, one by one."""
        yield from [request for request in self.running if request._prefill_left]
        while admits and self.waiting and len(self.running) < self.config.max_num_seqs:
            fits = self._adapters.fits
            request = next((each for each in self.waiting if fits(each.adapter)), None)
            if request is None or not self._admit(request):
                break
            self.waiting.remove(request)
            self.running.append(request)
            yield request

    def _admit(self, request: Request) -> bool:
        size, length = self.config.block_size_tokens, len(request.tokens)
        request._hashes = self._block_hashes(request)
        # The last token is always computed: its logits give the next one.
        cached = self.blocks.count_cached(request._hashes[: (length - 1) // size])
        capacity = -(-length // size) * size
        if not self.blocks.acquire(request._hashes[:cached], capacity - cached * size):
            return False
        self._num_loaded += self._adapters.take(request.adapter)
        request._num_held = cached
        request._capacity = capacity
        request._prefill_left = length - cached * size
        if request.started_s is None:
            request.started_s = self._clock()
            request.cached_tokens = cached * size
        return True

    def _share(self, request: Request, num_tokens: int) -> None:
        """Cache the full blocks of the first ``num_tokens``, which are computed in this step.

        As vLLM does: whoever is admitted from now on, in this step or a later one, has them.
        """
        size, held = self.config.block_size_tokens, request._num_held
        if num_tokens // size == held:
            return
        request._hashes = self._block_hashes(request)
        more = request._hashes[held : num_tokens // size]
        request._num_held += len(more)
        fresh = self.blocks.share(more)
        if fresh and self._prefixes is not None:
            first = request._num_held - fresh
            self._prefixes.add_blocks(
                request._hashes[first : request._num_held],
                request._hashes[first - 1] if first else None,
                request.tokens[first * size : request._num_held * size],
                request.adapter,
            )

    def _block_hashes(self, request: Request) -> list[int]:
        root = hash(request.adapter) if request.adapter else 0
        size = self.config.block_size_tokens
        return block_hashes(request.tokens, size, request._hashes, root)

    def _release(self, request: Request) -> None:
        """Free the blocks; what was computed in full blocks stays cached."""
        held = request._hashes[: request._num_held]
        private = request._capacity - len(held) * self.config.block_size_tokens
        self.blocks.release(held, private)
        self._adapters.give_back(request.adapter)
        request._num_held = request._capacity = request._prefill_left = 0
