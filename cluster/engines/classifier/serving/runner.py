"""The model threads: each takes a batch as soon as it is free, computes it, hands the rows back.

A batch is cut at the last moment, so it holds whatever came while the one before it ran; cutting
takes less than 1 % of computing. A batch that fails takes its own jobs alone, unless the model
cannot compute anything any more. Owns the model, the counters, and each job's rows from its first
batch on. Knows neither tokenizer nor HTTP.
"""

import contextlib
import copy
import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from cluster.batching import Batch
from cluster.config import ClassifierTask
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.team import pin_threads, share_threads
from cluster.engines.classifier.model.types import EncoderModel, Rows, TokenIds
from cluster.engines.classifier.serving.jobs import Job
from cluster.engines.classifier.serving.queue import JobQueue, Turn
from cluster.metrics import Histogram, table

GPU_STREAMS = 2
"""One has its batch computed, the other prepares the next."""
MAX_STREAMS = 4
"""More would wait for one another's Python: it takes a tenth of a thread's time."""


@dataclass(slots=True)
class RunnerCounts:
    """What one thread computed since the start; written by that thread alone."""

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    padding: float = 0.0
    """What was computed of no token, as the number of tokens it would make."""
    compute_s: float = 0.0
    """By thread: two seconds pass in one where two threads compute."""
    failed: int = 0
    """Batches that raised; not among the others."""
    batch_texts: Histogram = field(
        default_factory=lambda: Histogram(table.CLASSIFIER_BATCH_TEXTS.buckets)
    )

    def batch(self, texts: int, tokens: int, padding: float, compute_s: float) -> None:
        """Count a batch."""
        self.batches += 1
        self.texts += texts
        self.tokens += tokens
        self.padding += padding
        self.compute_s += compute_s
        self.batch_texts.observe(texts)

    def add(self, other: "RunnerCounts") -> None:
        """Count what ``other`` did, too."""
        self.batch_texts.add(other.batch_texts)
        self.batches += other.batches
        self.texts += other.texts
        self.tokens += other.tokens
        self.padding += other.padding
        self.compute_s += other.compute_s
        self.failed += other.failed


@dataclass(frozen=True, slots=True)
class RunnerEvents:
    """Whom the model threads tell, from one of them."""

    loaded: Callable[[LoadedModel], None]
    done: Callable[[Sequence[Job]], None]
    """Jobs whose rows are complete."""
    failed: Callable[[Sequence[Job], Exception], None]
    """The batch with these jobs failed; they are in no further one."""
    died: Callable[[Exception], None]
    """Loading failed, or the model computes nothing any more; nothing further comes."""


class ModelRunner:
    """Loads a model in a thread of its own and computes batches until the queue is closed.

    On a CPU there is a thread for each core, up to some, and while enough waits each computes a
    batch of its own with its share of the cores: threads that meet at the end of every operation
    lose much, most of all where other processes want the cores too. A batch that is alone gets all
    cores, and always the first thread takes it: a second one with threads of OpenMP's would make
    them more than cores, and OpenMP then lets them sleep at once (a lone text took 5.7 ms for 4.0).

    On a GPU there are two threads: while its batch is computed for one, the other lays out the next
    and uploads it, as soon as a full one waits.

    Args:
        load: Loads the model; called in the thread.
        queue: Where batches come from.
        events: Called from the threads.
        num_threads: Cores for everything that is computed.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        queue: JobQueue,
        events: RunnerEvents,
        num_threads: int,
    ) -> None:
        self._load = load
        self._queue = queue
        self._events = events
        self._num_threads = num_threads
        self._streams: list[_Stream] = []
        self._probe: list[TokenIds] = []
        self._spreads = False
        self._scattering = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._start(self._run)

    @property
    def counts(self) -> RunnerCounts:
        """Of all threads."""
        total = RunnerCounts()
        for stream in self._streams:
            total.add(stream.counts)
        return total

    @property
    def current(self) -> frozenset[Job]:
        """The jobs that have a text in a batch that runs."""
        return frozenset().union(*(stream.current for stream in self._streams))

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads, which end after their batch once the queue is closed; have they?"""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:  # the one that loads ends first, and has added the others
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            loaded = self._load()
            _trim_memory()
            self._probe = [loaded.tokenizer.shortest()]
            shares = [self._num_threads] * GPU_STREAMS
            if loaded.shares_cores:
                shares = share_threads(self._num_threads, min(self._num_threads, MAX_STREAMS))
            # A copy shares the weights, and counts for itself.
            models = [loaded.model, *(copy.copy(loaded.model) for _ in shares[1:])]
            self._streams = [_Stream(*each) for each in zip(models, shares, strict=True)]
            self._queue.share(len(shares), in_turn=not loaded.shares_cores)
            cores = len(os.sched_getaffinity(0))
            self._spreads = loaded.shares_cores and self._num_threads == len(shares) == cores
            self._events.loaded(loaded)
            # This thread ends, and with it the threads that it computed with: were there more of
            # OpenMP's than cores, it would let all of them sleep at once.
            for stream in self._streams:
                self._start(self._compute, stream)
        except Exception as error:
            self._events.died(error)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name="tandem-model", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _compute(self, stream: "_Stream") -> None:
        leads = stream is self._streams[0]
        try:
            if leads and self._spreads:
                pin_threads()
            while turn := self._queue.take(leads):
                try:
                    self._step(stream, turn)
                except Exception as error:
                    self._give_up(stream, error)
                    self._check(stream, turn)
                self._queue.finish()
        except Exception as error:
            self._events.died(error)
        finally:
            stream.current = frozenset()

    def _give_up(self, stream: "_Stream", error: Exception) -> None:
        """Fail the jobs of the batch that raised."""
        stream.counts.failed += 1
        jobs, stream.current = stream.current, frozenset()
        for job in jobs:
            self._queue.withdraw(job)
        self._events.failed(list(jobs), error)

    def _check(self, stream: "_Stream", turn: Turn) -> None:
        """Raise if the model cannot compute the shortest text: a device that is lost, say."""
        stream.model.run(cast(ClassifierTask, turn.batch.task), self._probe)

    def _step(self, stream: "_Stream", turn: Turn) -> None:
        batch = turn.batch
        stream.current = frozenset(item.key for item in batch.items)
        stream.use_threads(self._num_threads if turn.alone else stream.share)
        padding, begun_s = stream.model.padding, time.perf_counter()
        ids = [item.key.ids[item.index] for item in batch.items]
        rows = stream.model.run(cast(ClassifierTask, batch.task), ids)
        elapsed_s = time.perf_counter() - begun_s
        with self._scattering:  # a job's texts may be in two batches at once
            for job in stream.current:
                job.compute_s += elapsed_s
            done = _scatter(batch, rows)
        padding = stream.model.padding - padding  # it may have computed before, as a check
        stream.counts.batch(len(ids), batch.num_tokens, padding, elapsed_s)
        stream.current = frozenset()
        if done:
            self._events.done(done)


class _Stream:
    """What one of the threads owns."""

    def __init__(self, model: EncoderModel, share: int) -> None:
        self.model = model
        self.share = share
        """Threads that its operations may use beside the others."""
        self.counts = RunnerCounts()
        self.current: frozenset[Job] = frozenset()
        self._threads = 0

    def use_threads(self, number: int) -> None:
        """Let this thread's operations use so many; torch counts them for each calling thread."""
        if number != self._threads:
            torch.set_num_threads(number)
            self._threads = number


def _trim_memory() -> None:
    """Give back to the system what loading took and left: 0.25 GB after measuring agreement."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _scatter(batch: Batch[Job], rows: Rows | list[Rows]) -> list[Job]:
    """Give each row to its job; returns the jobs that have all theirs."""
    done = []
    for item, row in zip(batch.items, rows, strict=True):
        job = item.key
        if job.rows is None:
            job.rows = _room_for(len(job.ids), rows)
        job.rows[item.index] = row
        job.num_done += 1
        if job.num_done == len(job.ids):
            done.append(job)
    return done


def _room_for(num_rows: int, rows: Rows | list[Rows]) -> Rows | list[Rows]:
    if isinstance(rows, list):
        return [rows[0]] * num_rows
    return np.empty((num_rows, rows.shape[1]), np.float32)
