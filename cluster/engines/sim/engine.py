"""Simulated engine: runs the scheduler in the event loop and passes tokens to requests."""

import asyncio
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256

from msgspec.structs import replace

from cluster.asgi import ASGIApp
from cluster.config import GeneratorConfig
from cluster.engines.prefix_cache import PrefixTracker
from cluster.engines.sim import tokenizer
from cluster.engines.sim.adapters import AdapterSlots
from cluster.engines.sim.app import SimApp
from cluster.engines.sim.generation import DEAD, Generation, GenerationError
from cluster.engines.sim.http import HttpExchange
from cluster.engines.sim.scheduler import Scheduler
from cluster.engines.stall import StallDetector
from cluster.engines.startup import StartupTimer
from cluster.errors import ConfigError, EngineDeadError
from cluster.link import Adapters
from cluster.load import Load
from cluster.metrics import Registry
from cluster.routing import fingerprint

logger = logging.getLogger(__name__)

DEFAULT_MODEL_LEN = 8192
_STEPS_PER_YIELD = 8  # steps without duration between two turns of the event loop
_MAX_LAG_S = 0.05  # delay of a step that later steps make up for


class SimEngine:
    """``Engine`` without a model: vLLM's responses, with times and failures from ``SimConfig``."""

    workers = ()
    on_demand_bytes = 0

    def __init__(self, config: GeneratorConfig) -> None:
        self.config = config
        self.max_model_len = DEFAULT_MODEL_LEN
        self.prefixes = PrefixTracker(config.sim.block_size_tokens, tokenizer.byte_lengths)
        self._adapters = AdapterSlots(config.max_loras, config.adapters)
        self._scheduler = Scheduler(config.sim, time.monotonic, self.prefixes, self._adapters)
        self._generations: set[Generation] = set()
        self._num_hanging = 0
        self._num_steps = 0
        self._stall = StallDetector("engine", config.stall_timeout_s)
        self.num_accepted = 0
        """Requests accepted since the start."""
        self._leaked: list[bytes] = []
        self._dead = False
        self._work = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._random = random.Random(config.sim.seed)
        self.app: ASGIApp = SimApp(self)
        self.start_phases_s: dict[str, float] = {}

    @property
    def context_tokens(self) -> int:
        return self.max_model_len

    @property
    def resume_key(self) -> str:
        parts = ("sim", 1, self.config.model, self.config.sim.seed, "{}")
        return sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def adapters(self) -> Adapters:
        return Adapters(dict(self.config.adapters))

    @property
    def loaded_adapters(self) -> tuple[str, ...]:
        return self._adapters.loaded

    def observe(self, registry: Registry) -> None:
        """Do nothing: the router's metrics cover this engine."""

    def routes(self) -> tuple[str, ...]:
        return SimApp.routes

    async def start(self) -> None:
        """Become ready after ``startup_s``."""
        timer = StartupTimer()
        self.max_model_len = self._model_len()
        await asyncio.sleep(self.config.sim.startup_s)
        timer.mark("model")
        self.start_phases_s = timer.phases_s
        if self.config.sim.fail_startup:
            raise EngineDeadError("the simulated engine is configured to fail at startup")
        self._driver = asyncio.create_task(self._drive(), name="sim-engine")

    async def reconfigure(self, pool: GeneratorConfig) -> None:
        self.config = pool
        self._stall.timeout_s = pool.stall_timeout_s

    async def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine is dead or hangs."""
        if self._dead or self._driver is None or self._driver.done():
            raise EngineDeadError(DEAD)
        load = self.load()
        self._stall.check(self._num_steps, is_busy=bool(load.running or load.waiting))

    def load(self) -> Load:
        load = self._scheduler.load()
        return replace(load, running=load.running + self._num_hanging)

    async def stop(self) -> None:
        """Fail all requests as a dead engine does."""
        self._die()
        if self._driver is not None:
            self._driver.cancel()
            with suppress(asyncio.CancelledError, Exception):  # already logged by the driver
                await self._driver

    @contextmanager
    def generating(
        self,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        stop: Sequence[str],
        exchange: HttpExchange,
    ) -> Iterator[Generation]:
        """Generate for one HTTP request; abort its unfinished sequences at the end of the block.

        Raises:
            GenerationError: The engine is dead.
        """
        if self._dead:
            raise GenerationError(DEAD)
        sim = self.config.sim
        self.num_accepted += 1
        if sim.leak_bytes_per_request:
            self._leaked.append(b"\x01" * sim.leak_bytes_per_request)  # zero pages take no memory
        fails = sim.fail_rate > 0 and self._random.random() < sim.fail_rate
        adapter = exchange.model if exchange.model in self.config.adapters else ""
        generation = Generation(
            prompts,
            max_tokens,
            stop,
            usage=exchange.usage,
            seed=sim.seed,
            fails=fails,
            adapter=adapter,
            earlier=exchange.earlier,
            record=exchange.record_token,
        )
        self._generations.add(generation)
        hangs = sim.hang_after_requests is not None and self.num_accepted > sim.hang_after_requests
        self._num_hanging += hangs
        try:
            if not hangs:
                self._start(generation, exchange)
            yield generation
        finally:
            self._generations.discard(generation)
            self._num_hanging -= hangs
            for sequence in generation.sequences:
                if sequence.request.finished_s is None:
                    self._scheduler.abort(sequence.request)
            generation.count_times()

    def _start(self, generation: Generation, exchange: HttpExchange) -> None:
        for sequence in generation.sequences:
            if sequence.request.finished_s is None:
                self._scheduler.add_request(sequence.request)
        text = fingerprint(exchange.path, exchange.body)
        request = generation.sequences[0].request
        self.prefixes.add_prompt(text, request.tokens, request.adapter)
        self._work.set()
        limit = self.config.sim.die_after_requests
        if limit is not None and self.num_accepted >= limit:
            self._die()

    def _model_len(self) -> int:
        limit = self._scheduler.max_request_tokens
        wanted = self.config.max_model_len
        if wanted is not None and wanted > limit:
            raise ConfigError(
                f"max_model_len: got {wanted}; the {self.config.sim.num_kv_blocks} KV blocks of "
                f"{self.config.sim.block_size_tokens} tokens hold at most {limit}"
            )
        return wanted or min(DEFAULT_MODEL_LEN, limit)

    def _die(self) -> None:
        self._dead = True
        for generation in tuple(self._generations):
            generation.fail(DEAD)
            for sequence in generation.sequences:
                self._scheduler.abort(sequence.request)

    async def _drive(self) -> None:
        try:
            await self._run_steps()
        except Exception:
            logger.exception("the simulated engine failed")
            self._die()
            raise

    async def _run_steps(self) -> None:
        scheduler, now = self._scheduler, time.monotonic
        ends_at = now()
        while True:
            step = scheduler.plan()
            if step is None:
                self._work.clear()
                await self._work.wait()
                continue
            if step.duration_s > 0:
                ends_at = max(ends_at, now() - _MAX_LAG_S) + step.duration_s
                await asyncio.sleep(max(0.0, ends_at - now()))
            scheduler.commit(step)
            self._num_steps += 1
            if step.duration_s == 0 and self._num_steps % _STEPS_PER_YIELD == 0:
                await asyncio.sleep(0)
