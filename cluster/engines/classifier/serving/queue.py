"""Bounded queue of jobs between event loop, tokenizer threads and model threads.

The event loop admits and cancels jobs, the tokenizer threads put them, and the model threads take
batches. Every method may be called from any thread and holds the lock for a few milliseconds at
most. The bound is in tokens. The queue is the only owner of the batcher.
"""

import threading
from dataclasses import dataclass

from cluster.batching import Batch, Batcher
from cluster.engines.classifier.model.types import num_chars
from cluster.engines.classifier.serving.jobs import Job
from cluster.errors import OverloadedError, PayloadTooLargeError, RequestError

CHARS_PER_TOKEN = 4
"""Estimate used until a text is tokenized; English WordPiece has 4 to 5 characters per token."""
RETRY_AFTER_S = 1.0
MIN_CONCURRENT_TOKENS = 256
"""Smallest batch on a CPU that starts while another one runs. Fewer tokens wait instead of taking a
core away from it: on two cores, a batch of this size takes as long on both cores as two halves of
it take on one core each."""


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """A batch, and the cores it may use."""

    batch: Batch[Job]
    uses_all_cores: bool
    """True if no other batch runs and too little waits to start one."""


class JobQueue:
    """Jobs that wait for the model.

    Args:
        max_batch_tokens: Largest batch, in tokens.
        max_queued_tokens: Limit on waiting tokens; texts being tokenized count by estimate.
    """

    def __init__(self, max_batch_tokens: int, max_queued_tokens: int) -> None:
        self._batcher = Batcher[Job](max_batch_tokens)
        self._max_batch_tokens = max_batch_tokens
        self.max_queued_tokens = max_queued_tokens
        """Limit on waiting tokens; may be changed."""
        self._estimated_tokens = 0
        self._cancelled_early = 0
        self._closed: RequestError | None = None
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # wakes the leading thread
        self._has_enough = threading.Condition(lock)  # wakes the others, for large batches only
        self._running = 0
        self._num_streams = 1
        self._min_concurrent_tokens = MIN_CONCURRENT_TOKENS

    @property
    def queued_tokens(self) -> int:
        """Waiting tokens; texts being tokenized count by estimate."""
        return self._estimated_tokens + self._batcher.waiting_tokens

    @property
    def skipped_texts(self) -> int:
        """Texts not computed since the start, because their request was cancelled or failed."""
        return self._cancelled_early + self._batcher.skipped_texts

    def admit_job(self, job: Job) -> None:
        """Reserve room for a job that is not tokenized yet.

        Raises:
            OverloadedError: Too many tokens are waiting.
            RequestError: The queue is closed; the error it was closed with.
        """
        limit = job.reader.max_tokens_per_text
        estimates = (min(limit, num_chars(text) // CHARS_PER_TOKEN + 2) for text in job.texts)
        estimate = int(sum(estimates))
        with self._changed:
            self._check_open()
            if self.queued_tokens and self.queued_tokens + estimate > self.max_queued_tokens:
                raise self._overloaded_error()
            self._estimated_tokens += estimate
            job.estimated_tokens = estimate

    def put_job(self, job: Job) -> None:
        """Queue the texts of an admitted and tokenized job.

        Raises:
            OverloadedError: With its exact number of tokens, the job exceeds the limit.
            PayloadTooLargeError: The job exceeds the limit even if nothing else waits.
            RequestError: The queue is closed.
        """
        lengths = [len(ids) for ids in job.ids]
        tokens = sum(lengths)
        with self._changed:
            self._release_estimate(job)
            self._check_open()
            if job.cancelled:
                self._cancelled_early += len(lengths)
                return
            if tokens > self.max_queued_tokens:
                limit = self.max_queued_tokens
                message = f"the input has {tokens} tokens; a request may have {limit}"
                raise PayloadTooLargeError(message, param="input")
            if self.queued_tokens + tokens > self.max_queued_tokens:
                raise self._overloaded_error()
            self._batcher.add_request(job, job.head, lengths)
            self._changed.notify()
            self._wake_helper()

    def drop_job(self, job: Job) -> None:
        """Release the room of an admitted job that will not be put."""
        with self._changed:
            self._release_estimate(job)
            if job.cancelled:
                self._cancelled_early += len(job.texts)

    def cancel_job(self, job: Job) -> None:
        """Skip everything of a job that is not computed yet: its client disconnected."""
        with self._changed:
            job.cancelled = True
            self._batcher.cancel_request(job)

    def withdraw_job(self, job: Job) -> None:
        """Skip the waiting texts of a job that failed."""
        with self._changed:
            self._batcher.cancel_request(job)

    def set_streams(self, num_streams: int, *, one_at_a_time: bool = False) -> None:
        """Set the number of threads that take batches; waiting texts are divided among them.

        Args:
            num_streams: Number of threads.
            one_at_a_time: True for a device that computes one batch after the other, as a GPU does.
                Another batch is then only prepared meanwhile, and only a full one.
        """
        with self._changed:
            self._num_streams = num_streams
            self._min_concurrent_tokens = (
                self._max_batch_tokens if one_at_a_time else MIN_CONCURRENT_TOKENS
            )

    def take_batch(self, is_leader: bool = True) -> ScheduledBatch | None:
        """Block until a batch is worth starting; return None once the queue is closed.

        Call ``finish_batch`` after each batch.

        Args:
            is_leader: True for the thread that takes small batches; the others only take batches
                that are large enough to run concurrently.
        """
        with self._changed:
            while self._closed is None:
                if scheduled := self._schedule(is_leader):
                    return scheduled
                (self._changed if is_leader else self._has_enough).wait()
            return None

    def finish_batch(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify()

    def close(self, error: RequestError) -> None:
        """Refuse everything from now on with ``error`` and wake the model threads; idempotent."""
        with self._changed:
            self._closed = self._closed or error
            self._changed.notify_all()
            self._has_enough.notify_all()

    def _schedule(self, is_leader: bool) -> ScheduledBatch | None:
        waiting = self._batcher.waiting_tokens
        if waiting < self._min_concurrent_tokens and (self._running or not is_leader):
            return None
        share = -(-waiting // max(1, self._num_streams - self._running))
        batch = self._batcher.cut_batch(max(share, self._min_concurrent_tokens))
        if batch is None:
            return None
        self._running += 1
        self._wake_helper()
        too_few_left = self._batcher.waiting_tokens < self._min_concurrent_tokens
        is_alone = is_leader and self._running == 1 and too_few_left
        return ScheduledBatch(batch, uses_all_cores=is_alone)

    def _wake_helper(self) -> None:
        if self._batcher.waiting_tokens >= self._min_concurrent_tokens:
            self._has_enough.notify()

    def _release_estimate(self, job: Job) -> None:
        self._estimated_tokens -= job.estimated_tokens
        job.estimated_tokens = 0

    def _check_open(self) -> None:
        if self._closed is not None:
            raise type(self._closed)(self._closed.message, retry_after_s=RETRY_AFTER_S)

    def _overloaded_error(self) -> OverloadedError:
        return OverloadedError(
            f"{self.queued_tokens} tokens are waiting; the limit is {self.max_queued_tokens}",
            retry_after_s=RETRY_AFTER_S,
        )
