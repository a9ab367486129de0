"""Model threads: whenever one is free, it takes a batch, computes it and returns the rows.

Batches are cut at the last moment, so that they contain everything that arrived meanwhile; cutting
takes less than 1 % of computing. A failing batch fails only its own jobs, unless the model cannot
compute anything any more. The runner owns the model, the counters, and the rows of each job from
its first batch on.
"""

import copy
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from cluster.batching import Batch
from cluster.engines.classifier.model.device import pin_threads, share_threads
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.types import EncoderModel, Head, Rows, TokenIds
from cluster.engines.classifier.serving.jobs import Job
from cluster.engines.classifier.serving.metrics import BatchCounts
from cluster.engines.classifier.serving.queue import JobQueue, ScheduledBatch
from cluster.engines.stall import StallDetector
from cluster.memory import release_free_memory, use_huge_pages

GPU_STREAMS = 2
"""One has its batch computed while the other prepares the next."""
MAX_STREAMS = 4
"""Limit on threads on a CPU; Python takes a tenth of a thread's time, so more wait for the GIL."""


@dataclass(frozen=True, slots=True)
class RunnerEvents:
    """Callbacks, called from the model threads."""

    on_loaded: Callable[[LoadedModel], None]
    on_done: Callable[[Sequence[Job]], None]
    """Receives jobs whose rows are complete."""
    on_failed: Callable[[Sequence[Job], Exception], None]
    """Receives the jobs of a batch that raised; they are withdrawn from the queue."""
    on_died: Callable[[Exception], None]
    """Called last, if loading failed or the model cannot compute anything any more."""


class ModelRunner:
    """Loads a model in a thread and computes batches until the queue is closed.

    On a CPU there is a thread per core, up to ``MAX_STREAMS``. If enough is waiting, each computes
    its own batch on its share of the cores, because threads that meet after every operation
    waste time, most of all if other processes use the cores too. A single batch gets all cores and
    is always taken by the first thread: a second thread with an OpenMP team would make more threads
    than cores, and OpenMP would then stop spinning (a single text took 5.7 ms instead of 4.0).

    On a GPU there are two threads. While one has its batch computed, the other lays out and uploads
    the next, as soon as a full one is waiting.

    Args:
        load: Loads the model; called in the thread.
        queue: Source of batches.
        events: Callbacks, called from the threads.
        num_threads: Cores for all computing.
        stall_timeout_s: Time after which a batch counts as hung.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        queue: JobQueue,
        events: RunnerEvents,
        num_threads: int,
        stall_timeout_s: float,
    ) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._load = load
        self._queue = queue
        self._events = events
        self._num_threads = num_threads
        self._streams: list[_Stream] = []
        self._probe: list[TokenIds] = []
        self._pins_threads = False
        self._scatter_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._start_thread(self._run)

    @property
    def counts(self) -> BatchCounts:
        total = BatchCounts()
        for stream in self._streams:
            total.add_counts(stream.counts)
        return total

    @property
    def current_jobs(self) -> frozenset[Job]:
        """Jobs with a text in a running batch."""
        return frozenset().union(*(stream.jobs for stream in self._streams))

    def set_stall_timeout(self, timeout_s: float) -> None:
        """Change the time after which a batch counts as hung, in seconds."""
        for stream in self._streams:
            stream.stall.timeout_s = timeout_s

    def check_progress(self) -> None:
        """Raise if a batch hangs; called every second.

        Raises:
            EngineDeadError: A batch takes longer than the timeout.
        """
        for stream in self._streams:
            counts = stream.counts
            batches = counts.batches, counts.failed_batches
            stream.stall.check(batches, is_busy=stream.is_busy)

    def join(self, timeout_s: float) -> bool:
        """Wait until the threads end, after the queue is closed; return False on timeout."""
        deadline_s = time.monotonic() + timeout_s
        # The loading thread comes first and starts the others before it ends.
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            loaded = self._load()
            release_free_memory()  # 0.25 GB after measuring agreement
            use_huge_pages()  # each text reads all weights: 10 % faster alone, 1 % in batches
            self._probe = [loaded.tokenizer.encode_shortest()]
            shares = [self._num_threads] * GPU_STREAMS
            if loaded.shares_cores:
                shares = share_threads(self._num_threads, min(self._num_threads, MAX_STREAMS))
            # Copies share the weights and count their own padding.
            models = [loaded.model, *(copy.copy(loaded.model) for _ in shares[1:])]
            self._streams = [
                _Stream(model, share, StallDetector("model", self._stall_timeout_s))
                for model, share in zip(models, shares, strict=True)
            ]
            self._queue.set_streams(len(shares), one_at_a_time=not loaded.shares_cores)
            cores = len(os.sched_getaffinity(0))
            self._pins_threads = loaded.shares_cores and self._num_threads == len(shares) == cores
            self._events.on_loaded(loaded)
            # This thread ends, and with it its OpenMP team. With more OpenMP threads than cores,
            # all of them would stop spinning.
            for stream in self._streams:
                self._start_thread(self._compute_batches, stream)
        except Exception as error:
            self._events.on_died(error)

    def _start_thread(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name="tandem-model", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _compute_batches(self, stream: "_Stream") -> None:
        is_leader = stream is self._streams[0]
        try:
            if is_leader and self._pins_threads:
                pin_threads()
            while scheduled := self._queue.take_batch(is_leader):
                stream.is_busy = True
                try:
                    self._compute(stream, scheduled)
                except Exception as error:
                    self._fail_batch(stream, error)
                    # This also fails if the model cannot compute anything, as on a lost device.
                    stream.model.run(cast(Head, scheduled.batch.task), self._probe)
                self._queue.finish_batch()
                stream.is_busy = False
        except Exception as error:
            self._events.on_died(error)
        finally:
            stream.jobs = frozenset()
            stream.is_busy = False

    def _compute(self, stream: "_Stream", scheduled: ScheduledBatch) -> None:
        batch = scheduled.batch
        stream.jobs = frozenset(item.key for item in batch.items)
        stream.use_threads(self._num_threads if scheduled.uses_all_cores else stream.share)
        padding, started_s = stream.model.padding, time.perf_counter()
        ids = [item.key.ids[item.index] for item in batch.items]
        rows = stream.model.run(cast(Head, batch.task), ids)
        elapsed_s = time.perf_counter() - started_s
        with self._scatter_lock:  # a job may have texts in two running batches
            for job in stream.jobs:
                job.compute_s += elapsed_s
            done = _scatter(batch, rows)
        # Only the difference: the model may have computed batches while it was loaded.
        padding = stream.model.padding - padding
        stream.counts.add_batch(len(ids), batch.num_tokens, padding, elapsed_s)
        stream.jobs = frozenset()
        if done:
            self._events.on_done(done)

    def _fail_batch(self, stream: "_Stream", error: Exception) -> None:
        stream.counts.failed_batches += 1
        jobs, stream.jobs = stream.jobs, frozenset()
        for job in jobs:
            self._queue.withdraw_job(job)
        self._events.on_failed(list(jobs), error)


class _Stream:
    def __init__(self, model: EncoderModel, share: int, stall: StallDetector) -> None:
        self.model = model
        self.stall = stall
        self.share = share
        """Threads for its operations while other streams compute."""
        self.counts = BatchCounts()
        self.jobs: frozenset[Job] = frozenset()
        self.is_busy = False
        """True during a batch and, if it fails, the probe that follows it."""
        self._threads = 0

    def use_threads(self, number: int) -> None:
        """Set the threads of this thread's operations; torch keeps the number per thread."""
        if number != self._threads:
            torch.set_num_threads(number)
            self._threads = number


def _scatter(batch: Batch[Job], rows: Rows | list[Rows]) -> list[Job]:
    """Store each row in its job and return the jobs that are complete."""
    done = []
    for item, row in zip(batch.items, rows, strict=True):
        job = item.key
        if job.rows is None:
            job.rows = _empty_like(rows, len(job.ids))
        job.rows[item.index] = row
        job.num_done += 1
        if job.num_done == len(job.ids):
            done.append(job)
    return done


def _empty_like(rows: Rows | list[Rows], num_rows: int) -> Rows | list[Rows]:
    if isinstance(rows, list):
        return [rows[0]] * num_rows
    return np.empty((num_rows, rows.shape[1]), np.float32)
