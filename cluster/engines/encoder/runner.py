"""The model thread: takes a batch as soon as the model is free, computes it, hands the rows back.

A batch is cut at the last moment, so it holds whatever came while the one before it ran; cutting
takes less than 1 % of computing. Owns the model, the counters, and each job's rows from its
first batch on. Knows neither tokenizer nor HTTP.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from cluster.batching import Batch
from cluster.config import ClassifierTask
from cluster.engines.encoder.jobs import Job, Rows
from cluster.engines.encoder.model import EncoderModel, LoadedModel
from cluster.engines.encoder.queue import JobQueue


@dataclass(slots=True)
class RunnerCounts:
    """What the model computed since the start; written by the model thread alone."""

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RunnerEvents:
    """Whom the model thread tells, from that thread."""

    loaded: Callable[[LoadedModel], None]
    done: Callable[[Sequence[Job]], None]
    """Jobs whose rows are complete."""
    died: Callable[[Exception], None]
    """Loading or computing failed; nothing further comes."""


class ModelRunner:
    """Loads a model in a thread of its own and computes batches there until the queue is closed.

    Args:
        load: Loads the model; called in the thread.
        queue: Where batches come from.
        events: Called from the thread.
        num_threads: torch's threads for one operation; OpenMP counts them for each caller, so
            they are set on this thread.
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
        self.counts = RunnerCounts()
        self.current: frozenset[Job] = frozenset()
        """The jobs that have a text in the batch that runs."""
        self._thread = threading.Thread(target=self._run, name="tandem-model", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread, which ends after its batch once the queue is closed; has it?"""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            loaded = self._load()
            self._events.loaded(loaded)
            while batch := self._queue.take():
                self._step(loaded.model, batch)
        except Exception as error:
            self._events.died(error)
        finally:
            self.current = frozenset()

    def _step(self, model: EncoderModel, batch: Batch[Job]) -> None:
        self.current = frozenset(item.key for item in batch.items)
        begun_s = time.perf_counter()
        ids = [item.key.ids[item.index] for item in batch.items]
        rows = model.run(cast(ClassifierTask, batch.task), ids)
        elapsed_s = time.perf_counter() - begun_s
        for job in self.current:
            job.compute_s += elapsed_s
        done = _scatter(batch, rows)
        self.counts.batches += 1
        self.counts.texts += len(ids)
        self.counts.tokens += batch.num_tokens
        self.counts.compute_s += elapsed_s
        self.current = frozenset()
        if done:
            self._events.done(done)


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
