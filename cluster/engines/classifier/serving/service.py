"""Classifier without HTTP: texts in, rows out.

The service connects tokenizer threads, queue and model threads to the event loop. It owns every
admitted job until its future has a result, a typed error or a cancellation.
"""

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from cluster.config import ClassifierConfig
from cluster.engines.classifier.model.device import num_threads
from cluster.engines.classifier.model.load import LoadedModel, load_model
from cluster.engines.classifier.model.tokenizer import TextReader
from cluster.engines.classifier.model.types import Head, ModelInput, num_chars
from cluster.engines.classifier.serving.jobs import Encoded, Job
from cluster.engines.classifier.serving.metrics import ClassifierCounts
from cluster.engines.classifier.serving.queue import JobQueue
from cluster.engines.classifier.serving.runner import ModelRunner, RunnerEvents
from cluster.engines.classifier.serving.tokenizer_stage import PASS_CHARS, TokenizerStage
from cluster.engines.stall import StallDetector
from cluster.errors import (
    ConfigError,
    EngineDeadError,
    InternalError,
    RequestError,
    UnavailableError,
)
from cluster.load import Load
from cluster.periodic import run_in_daemon_thread

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
"""Longest wait for the running batch, which takes about 1 s on a slow CPU."""


class ClassifierService:
    """One loaded model with its threads. Make one with ``start``, and use it on one event loop.

    Args:
        config: The pool.
        load: Loads the model; called on the model thread.
    """

    def __init__(self, config: ClassifierConfig, load: Callable[[], LoadedModel]) -> None:
        self._loop = asyncio.get_running_loop()
        self._open: set[Job] = set()
        self._dead: str | None = None
        self._queue = JobQueue(config.max_batch_tokens, config.max_queued_tokens)
        self._loaded: asyncio.Future[LoadedModel] = self._loop.create_future()
        events = RunnerEvents(
            on_loaded=functools.partial(self._call_on_loop, self._on_loaded),
            on_done=functools.partial(self._call_on_loop, self._on_done),
            on_failed=functools.partial(self._call_on_loop, self._on_failed),
            on_died=functools.partial(self._call_on_loop, self._on_died),
        )
        self._runner = ModelRunner(
            load, self._queue, events, num_threads(config), config.stall_timeout_s
        )
        self._stages: tuple[TokenizerStage, ...] = ()
        self._stalls = [StallDetector("tokenizer", config.stall_timeout_s) for _ in range(2)]
        self.model: LoadedModel

    @classmethod
    async def start(cls, config: ClassifierConfig, path: str) -> "ClassifierService":
        """Load the model at ``path`` and return when it can answer.

        Raises:
            ConfigError: The model or its configuration is wrong.
            EngineDeadError: Loading failed for another reason.
        """
        # Tokenizing is 100 times faster than the model; more threads would only take its cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self = cls(config, lambda: load_model(config, path))
        try:
            self.model = await self._loaded
        except BaseException:
            self._queue.close(UnavailableError("the engine did not start"))
            raise
        # The second stage tokenizes long texts, so that short ones do not wait for them.
        fail = functools.partial(self._call_on_loop, _fail)
        self._stages = tuple(TokenizerStage(self._queue, fail) for _ in range(2))
        return self

    def reconfigure(self, config: ClassifierConfig) -> None:
        """Apply changed limits."""
        self._queue.max_queued_tokens = config.max_queued_tokens
        self._runner.set_stall_timeout(config.stall_timeout_s)
        for stall in self._stalls:
            stall.timeout_s = config.stall_timeout_s

    async def encode(
        self, head: Head, inputs: Sequence[ModelInput], reader: TextReader | None = None
    ) -> Encoded:
        """Compute a row per input; cancelling skips everything that is not computed yet.

        Args:
            head: Result to compute; one that the model has.
            inputs: Texts, pairs of texts, or rows of valid token ids up to the model's length.
            reader: Reads the texts; None refuses long ones.

        Raises:
            InvalidRequestError: A text is too long or not valid Unicode.
            OverloadedError: Too many tokens are waiting.
            PayloadTooLargeError: The request alone exceeds the limit on waiting tokens.
            UnavailableError: The engine is stopping, or dead (``EngineDeadError``).
            InternalError: The model failed on a batch with a text of the request.
        """
        future: asyncio.Future[Encoded] = self._loop.create_future()
        texts = [item for item in inputs if isinstance(item, (str, tuple))]
        reader = reader or self.model.tokenizer.readers[None]
        job = Job(head, texts, reader, future, time.perf_counter())
        job.ids = [item for item in inputs if isinstance(item, np.ndarray)]
        self._queue.admit_job(job)
        self._open.add(job)
        try:
            self._submit(job)
            return await future
        except asyncio.CancelledError:
            self._queue.cancel_job(job)
            raise
        finally:
            self._open.discard(job)

    def check_health(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        try:
            self._runner.check_progress()
            for stage, stall in zip(self._stages, self._stalls, strict=True):
                stall.check(stage.num_passes, is_busy=stage.is_busy)
        except EngineDeadError as error:
            self._die(error.message)
            raise

    def load(self) -> Load:
        running = len(self._open & self._runner.current_jobs)
        return Load(running=running, waiting=len(self._open) - running)

    def counts(self) -> ClassifierCounts:
        agreement = self.model.agreement
        counts = ClassifierCounts(
            skipped_texts=self._queue.skipped_texts,
            agreement=agreement.share if agreement else None,
            tokenize_s=sum(stage.tokenize_s for stage in self._stages),
            queued_tokens=self._queue.queued_tokens,
        )
        counts.add_counts(self._runner.counts)
        return counts

    async def stop(self) -> None:
        """Refuse new requests, fail open ones, and end the threads."""
        error = UnavailableError("the engine is stopping", retry_after_s=1.0)
        self._queue.close(error)
        self._fail_open(error)
        for end in (*(stage.stop for stage in self._stages), self._runner.join):
            if not await run_in_daemon_thread(
                functools.partial(end, STOP_TIMEOUT_S), "tandem-stop"
            ):
                log.warning("a thread did not end within %s s; leaving it", STOP_TIMEOUT_S)

    def _submit(self, job: Job) -> None:
        if job.texts:
            short, long = self._stages
            stage = long if max(map(num_chars, job.texts)) > PASS_CHARS else short
            stage.submit(job)
        else:
            job.tokenized_s = job.admitted_s
            self._queue.put_job(job)

    def _call_on_loop(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed, so no one awaits the result
            log.warning("the event loop was closed before the engine was stopped")

    def _on_loaded(self, loaded: LoadedModel) -> None:
        if not self._loaded.done():
            self._loaded.set_result(loaded)

    def _on_done(self, jobs: Sequence[Job]) -> None:
        now_s = time.perf_counter()
        for job in jobs:
            if not job.future.done():
                job.future.set_result(job.to_encoded(now_s))

    def _on_failed(self, jobs: Sequence[Job], error: Exception) -> None:
        log.error("the model failed on a batch of %d requests", len(jobs), exc_info=error)
        for job in jobs:
            _fail(job, InternalError("the model failed on this request"))

    def _on_died(self, error: Exception) -> None:
        if self._loaded.done():
            log.error("the model failed; this engine is dead", exc_info=error)
        elif isinstance(error, ConfigError):
            self._loaded.set_exception(error)
            return
        else:
            log.error("the model could not be loaded", exc_info=error)
            self._loaded.set_exception(EngineDeadError("the model could not be loaded"))
        self._die(f"the model failed ({type(error).__name__}); see the log")

    def _die(self, reason: str) -> None:
        self._dead = reason
        dead = EngineDeadError(self._dead, retry_after_s=1.0)
        self._queue.close(dead)
        self._fail_open(dead)

    def _fail_open(self, error: RequestError) -> None:
        for job in self._open:
            _fail(job, error)


def _fail(job: Job, error: RequestError) -> None:
    if not job.future.done():
        job.future.set_exception(error)
