"""Requests in, rows out: the stages put together, on the event loop's side.

Owns every admitted job until its future has a result, a typed error or a cancel. Knows no HTTP.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.device import num_threads
from cluster.engines.classifier.model.load import LoadedModel, load_model
from cluster.engines.classifier.model.template import Side
from cluster.engines.classifier.model.tokenizer import TextReader
from cluster.engines.classifier.model.types import Text, TokenIds, num_chars
from cluster.engines.classifier.serving.jobs import Encoded, Job
from cluster.engines.classifier.serving.queue import JobQueue
from cluster.engines.classifier.serving.runner import ModelRunner, RunnerEvents
from cluster.engines.classifier.serving.tokenizer_stage import PASS_CHARS, TokenizerStage
from cluster.errors import (
    ConfigError,
    EngineDeadError,
    InternalError,
    RequestError,
    UnavailableError,
)
from cluster.load import Load
from cluster.metrics import Histogram

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
"""The longest wait for the batch that runs; a batch takes about a second on slow processors."""


@dataclass(frozen=True, slots=True)
class ClassifierCounts:
    """What the engine did since its start, for metrics."""

    batches: int
    texts: int
    tokens: int
    compute_s: float
    skipped_texts: int
    """Never computed, because their client left or their request failed."""
    padding: float
    """What was computed of no token, as the number of tokens it would make."""
    agreement: float | None
    """How often low precision answers as float32 does; None: it is float32."""
    failed_batches: int
    """Batches that raised."""
    batch_texts: Histogram
    tokenize_s: float
    queued_tokens: int
    """Tokens that wait now."""
    cache_hits: int = 0
    """Texts whose result was kept from before; 0 without a result cache."""
    cache_misses: int = 0


class ClassifierService:
    """One loaded model and the threads (event loop, tokenizers, model) that feed it.

    Use ``start`` to make one; all methods are called on the loop that made it.

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
            loaded=lambda loaded: self._call(self._on_loaded, loaded),
            done=lambda jobs: self._call(self._on_done, jobs),
            failed=lambda jobs, error: self._call(self._on_failure, jobs, error),
            died=lambda error: self._call(self._on_death, error),
        )
        self._runner = ModelRunner(load, self._queue, events, num_threads(config))
        self._stages: tuple[TokenizerStage, ...] = ()
        self.model: LoadedModel

    @classmethod
    async def start(cls, config: ClassifierConfig, path: str) -> "ClassifierService":
        """Load the model at ``path`` and return when it can answer.

        Raises:
            ConfigError: the model is wrong.
            EngineDeadError: loading failed in another way.
        """
        # Tokenizing is 100 times faster than the model: threads for it would only take its cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self = cls(config, lambda: load_model(config, path))
        try:
            self.model = await self._loaded
        except BaseException:
            self._queue.close(UnavailableError("the engine did not start"))
            raise
        # A text that takes long to read is read beside the others, not before them.
        self._stages = tuple(TokenizerStage(self._queue, self._fail_from_thread) for _ in range(2))
        return self

    async def encode(
        self,
        task: ClassifierTask,
        inputs: Sequence[Text] | Sequence[TokenIds],
        truncate: bool | Side = False,
        reader: TextReader | None = None,
    ) -> Encoded:
        """Compute a row for each input; cancelling skips what is not computed yet.

        Args:
            task: What the model is to compute: the head of one of the configured tasks.
            inputs: Texts, with pairs or without, or token ids within the vocabulary and the
                model's length.
            truncate: Cut texts that are too long, where otherwise they are refused.
            reader: Reads the texts in another way than as one row each, cut as ``truncate`` says.

        Raises:
            InvalidRequestError: a text is too long or no valid Unicode.
            OverloadedError: too many tokens wait already.
            PayloadTooLargeError: the request alone has more tokens than may wait.
            UnavailableError: the engine stops, or is dead (``EngineDeadError``).
            InternalError: the model failed on the batch that a text of it was in.
        """
        future: asyncio.Future[Encoded] = self._loop.create_future()
        texts = [item for item in inputs if isinstance(item, (str, tuple))]
        reader = reader or self.model.tokenizer.reader(truncate)
        job = Job(task, texts, reader, future, time.perf_counter())
        job.ids = [item for item in inputs if isinstance(item, np.ndarray)]
        self._queue.admit(job)
        self._open.add(job)
        try:
            self._hand_over(job)
            return await future
        except asyncio.CancelledError:
            self._queue.cancel(job)
            raise
        finally:
            self._open.discard(job)

    def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the model thread failed."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    def load(self) -> Load:
        """Requests with a text in the batch that runs, and the other admitted ones."""
        running = len(self._open & self._runner.current)
        return Load(running=running, waiting=len(self._open) - running)

    def counts(self) -> ClassifierCounts:
        """The counters, at one moment."""
        done = self._runner.counts
        agreement = self.model.agreement
        return ClassifierCounts(
            batches=done.batches,
            texts=done.texts,
            tokens=done.tokens,
            compute_s=done.compute_s,
            skipped_texts=self._queue.skipped_texts,
            padding=done.padding,
            agreement=agreement.share if agreement else None,
            failed_batches=done.failed,
            batch_texts=done.batch_texts,
            tokenize_s=sum(stage.tokenize_s for stage in self._stages),
            queued_tokens=self._queue.queued_tokens,
        )

    async def stop(self) -> None:
        """Refuse new requests, fail those that are open, and end the threads."""
        error = UnavailableError("the engine stops", retry_after_s=1.0)
        self._queue.close(error)
        self._fail_open(error)
        for stage in self._stages:
            await asyncio.to_thread(stage.stop)
        if not await asyncio.to_thread(self._runner.join, STOP_TIMEOUT_S):
            log.warning("the model did not end within %s s; its thread is left", STOP_TIMEOUT_S)

    def _hand_over(self, job: Job) -> None:
        if job.texts:
            short, long = self._stages
            stage = long if max(map(num_chars, job.texts)) > PASS_CHARS else short
            stage.submit(job)
        else:
            job.tokenized_s = job.admitted_s
            self._queue.put(job)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Run ``function`` on the event loop, from another thread."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed, so nobody waits for this
            log.warning("the event loop ended before the engine was stopped")

    def _on_loaded(self, loaded: LoadedModel) -> None:
        if not self._loaded.done():
            self._loaded.set_result(loaded)

    def _on_done(self, jobs: Sequence[Job]) -> None:
        now_s = time.perf_counter()
        for job in jobs:
            if not job.future.done():
                job.future.set_result(job.to_encoded(now_s))

    def _on_failure(self, jobs: Sequence[Job], error: Exception) -> None:
        log.error("the model failed on a batch of %d requests", len(jobs), exc_info=error)
        for job in jobs:
            _fail(job, InternalError("the model failed while this request was in it"))

    def _on_death(self, error: Exception) -> None:
        if self._loaded.done():
            log.error("the model failed; this engine is dead", exc_info=error)
        elif isinstance(error, ConfigError):
            self._loaded.set_exception(error)
            return
        else:
            log.error("the model could not be loaded", exc_info=error)
            self._loaded.set_exception(EngineDeadError("the model could not be loaded"))
        self._dead = f"the model failed ({type(error).__name__}); see the log"
        dead = EngineDeadError(self._dead, retry_after_s=1.0)
        self._queue.close(dead)
        self._fail_open(dead)

    def _fail_from_thread(self, job: Job, error: RequestError) -> None:
        self._call(_fail, job, error)

    def _fail_open(self, error: RequestError) -> None:
        for job in self._open:
            _fail(job, error)


def _fail(job: Job, error: RequestError) -> None:
    if not job.future.done():
        job.future.set_exception(error)
