"""The queue of jobs, and the only owner of the batcher.

The event loop admits and cancels, the tokenizer threads put, the model threads take; every
method is safe from any thread and holds the lock for at most some milliseconds. What waits is
bounded in tokens. Knows nothing of models or replies.
"""

import threading
from dataclasses import dataclass

from cluster.batching import Batch, Batcher
from cluster.engines.classifier.model.types import num_chars
from cluster.engines.classifier.serving.jobs import Job
from cluster.errors import OverloadedError, PayloadTooLargeError, RequestError

CHARS_PER_TOKEN = 4
"""English WordPiece has 4 to 5 characters a token; used only until a text is tokenized."""
RETRY_AFTER_S = 1.0
MIN_BESIDE_TOKENS = 256
"""Fewer tokens than this wait for the batch that runs, rather than take a core from it: on two
cores a batch of so many takes as long on both as two halves do on one each."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A batch, and which share of the cores it may take."""

    batch: Batch[Job]
    alone: bool
    """Nothing runs beside it, and too little waits to be run beside it."""


class JobQueue:
    """Jobs that wait for the model.

    Args:
        max_batch_tokens: Tokens in a batch.
        max_queued_tokens: Tokens that may wait, those being tokenized (by estimate) included.
    """

    def __init__(self, max_batch_tokens: int, max_queued_tokens: int) -> None:
        self._batcher = Batcher[Job](max_batch_tokens)
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._expected_tokens = 0
        self._cancelled_early = 0
        self._closed: RequestError | None = None
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # what the leading thread waits for
        self._enough = threading.Condition(lock)  # the others, whom a lone text need not wake
        self._running = 0
        self._num_streams = 1
        self._min_beside_tokens = MIN_BESIDE_TOKENS

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait, those being tokenized by estimate."""
        return self._expected_tokens + self._batcher.waiting_tokens

    @property
    def skipped_texts(self) -> int:
        """Texts that were not computed because their client left or their request failed, since the
        start."""
        return self._cancelled_early + self._batcher.skipped_texts

    def admit(self, job: Job) -> None:
        """Take a job on, before it is tokenized.

        Raises:
            OverloadedError: too much waits already.
            RequestError: the queue is closed; the error it was closed with.
        """
        most = job.reader.max_tokens_per_text
        expected = sum(int(min(most, num_chars(text) // CHARS_PER_TOKEN + 2)) for text in job.texts)
        with self._changed:
            self._check_open()
            if self.queued_tokens and self.queued_tokens + expected > self._max_queued_tokens:
                raise self._overloaded()
            self._expected_tokens += expected
            job.estimated_tokens = expected

    def put(self, job: Job) -> None:
        """Let the texts of an admitted and tokenized job wait for the model.

        Raises:
            OverloadedError: now that its tokens are known, they are too many beside the others.
            PayloadTooLargeError: they are too many even alone.
            RequestError: the queue is closed.
        """
        lengths = [len(ids) for ids in job.ids]
        tokens = sum(lengths)
        with self._changed:
            self._release(job)
            self._check_open()
            if job.cancelled:
                self._cancelled_early += len(lengths)
                return
            if tokens > self._max_queued_tokens:
                raise PayloadTooLargeError(
                    f"the input has {tokens} tokens; a request may have {self._max_queued_tokens}",
                    param="input",
                )
            if self.queued_tokens + tokens > self._max_queued_tokens:
                raise self._overloaded()
            self._batcher.add(job, job.task, lengths)
            self._changed.notify()
            self._call_help()

    def drop(self, job: Job) -> None:
        """Forget an admitted job that will not be put."""
        with self._changed:
            self._release(job)
            if job.cancelled:
                self._cancelled_early += len(job.texts)

    def cancel(self, job: Job) -> None:
        """The job's client has left: what is not computed yet will not be."""
        with self._changed:
            job.cancelled = True
            self._batcher.cancel(job)

    def withdraw(self, job: Job) -> None:
        """The job has failed: its texts that still wait will not be computed."""
        with self._changed:
            self._batcher.cancel(job)

    def share(self, num_streams: int, *, in_turn: bool = False) -> None:
        """Say how many threads take batches; they are cut so that each has one.

        Args:
            num_streams: Threads.
            in_turn: Whether what they compute with takes one batch at a time, as a GPU does: a
                further one is only prepared beside it, and not before it is full.
        """
        with self._changed:
            self._num_streams = num_streams
            self._min_beside_tokens = self._max_batch_tokens if in_turn else MIN_BESIDE_TOKENS

    def take(self, leads: bool = True) -> Turn | None:
        """Block until a batch is worth starting and cut it; None once the queue is closed.

        Each turn is given back with ``finish``.

        Args:
            leads: Whether this is the thread that takes what is alone; the others only help it.
        """
        with self._changed:
            while self._closed is None:
                if turn := self._turn(leads):
                    return turn
                (self._changed if leads else self._enough).wait()
            return None

    def finish(self) -> None:
        """The batch of a turn is done."""
        with self._changed:
            self._running -= 1
            self._changed.notify()

    def _turn(self, leads: bool) -> Turn | None:
        waiting = self._batcher.waiting_tokens
        if waiting < self._min_beside_tokens and (self._running or not leads):
            return None
        share = -(-waiting // max(1, self._num_streams - self._running))
        batch = self._batcher.cut(max(share, self._min_beside_tokens))
        if batch is None:
            return None
        self._running += 1
        self._call_help()
        left = self._batcher.waiting_tokens
        alone = leads and self._running == 1 and left < self._min_beside_tokens
        return Turn(batch, alone)

    def close(self, error: RequestError) -> None:
        """Refuse everything from now on with ``error`` and wake the model threads; idempotent."""
        with self._changed:
            self._closed = self._closed or error
            self._changed.notify_all()
            self._enough.notify_all()

    def _call_help(self) -> None:
        if self._batcher.waiting_tokens >= self._min_beside_tokens:
            self._enough.notify()

    def _release(self, job: Job) -> None:
        self._expected_tokens -= job.estimated_tokens
        job.estimated_tokens = 0

    def _check_open(self) -> None:
        if self._closed is not None:
            raise type(self._closed)(self._closed.message, retry_after_s=RETRY_AFTER_S)

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(
            f"{self.queued_tokens} tokens wait already; the limit is {self._max_queued_tokens}",
            retry_after_s=RETRY_AFTER_S,
        )
