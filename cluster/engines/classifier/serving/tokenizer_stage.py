"""Tokenizer stage: a thread between the event loop and the queue.

The thread takes all waiting texts at once, up to ``PASS_CHARS`` per job. Many small jobs then cost
one tokenizer call, and a large job does not delay them. The stage owns its jobs until it puts them
in the queue or fails them.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

from cluster.engines.classifier.model.tokenizer import TextReader
from cluster.engines.classifier.model.types import Text, num_chars
from cluster.engines.classifier.serving.jobs import Job
from cluster.engines.classifier.serving.queue import JobQueue
from cluster.errors import InternalError, InvalidRequestError, RequestError

log = logging.getLogger(__name__)

PASS_CHARS = 50_000
"""Characters of one job that are tokenized before other jobs continue; takes about 10 ms."""

Fail = Callable[[Job, RequestError], None]
Piece = tuple[Job, Sequence[Text]]
"""A job and the next texts of it to tokenize."""


class TokenizerStage:
    """Tokenizes jobs in a thread and puts them in the queue.

    Args:
        queue: Destination of tokenized jobs.
        fail: Called from the thread with each job that cannot be queued.
    """

    def __init__(self, queue: JobQueue, fail: Fail) -> None:
        self._queue = queue
        self._fail = fail
        self._jobs: deque[Job] = deque()
        self._stopping = False
        self._is_tokenizing = False
        self.num_passes = 0
        """Passes over the waiting texts since the start."""
        self.tokenize_s = 0.0
        """Tokenizing time since the start."""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tandem-tokenizer", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """True if texts wait or are being tokenized."""
        return self._is_tokenizing or bool(self._jobs)

    def submit(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def stop(self, timeout_s: float) -> bool:
        """End the thread and leave the waiting jobs as they are; return False on timeout."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while jobs := self._next_jobs():
            by_reader: dict[TextReader, list[Piece]] = {}
            for job in jobs:
                if job.cancelled:
                    self._queue.drop_job(job)
                else:
                    by_reader.setdefault(job.reader, []).append((job, _next_texts(job)))
            for pieces in by_reader.values():
                started_s = time.perf_counter()
                tokenized = self._tokenize(pieces)
                self.tokenize_s += time.perf_counter() - started_s
                for job in tokenized:
                    self._queue_or_resubmit(job)

    def _next_jobs(self) -> list[Job]:
        self.num_passes += 1
        with self._changed:
            self._is_tokenizing = False
            while not self._jobs and not self._stopping:
                self._changed.wait()
            jobs = [] if self._stopping else list(self._jobs)
            self._jobs.clear()
            self._is_tokenizing = bool(jobs)
            return jobs

    def _tokenize(self, pieces: list[Piece]) -> list[Job]:
        """Tokenize pieces that share a reader, and return the jobs that did not fail."""
        if len(pieces) > 1:
            texts = [text for _, part in pieces for text in part]
            try:
                rows = iter(pieces[0][0].reader.read(texts, 0))
            except Exception:  # tokenize one by one to find out whose text it was
                pass
            else:
                for job, part in pieces:  # a shared reader makes one row per text
                    job.ids += islice(rows, len(part))
                    job.num_tokenized += len(part)
                return [job for job, _ in pieces]
        return [job for job, texts in pieces if self._tokenize_alone(job, texts)]

    def _tokenize_alone(self, job: Job, texts: Sequence[Text]) -> bool:
        """Tokenize texts of one job; on an error, fail the job and return False."""
        failure: RequestError
        try:
            job.ids += job.reader.read(texts, job.num_tokenized)
            job.num_tokenized += len(texts)
            return True
        except RequestError as error:
            failure = error
        except (TypeError, UnicodeError):
            failure = InvalidRequestError("input is not valid Unicode", param="input")
        except Exception:
            log.exception("the tokenizer failed")
            failure = InternalError("the tokenizer failed")
        self._queue.drop_job(job)
        self._fail(job, failure)
        return False

    def _queue_or_resubmit(self, job: Job) -> None:
        if job.num_tokenized < len(job.texts):
            return self.submit(job)
        job.tokenized_s = time.perf_counter()
        try:
            self._queue.put_job(job)
        except RequestError as error:
            self._fail(job, error)


def _next_texts(job: Job) -> Sequence[Text]:
    stop, chars = job.num_tokenized, 0
    while stop < len(job.texts) and chars < PASS_CHARS:
        chars += num_chars(job.texts[stop])
        stop += 1
    return job.texts[job.num_tokenized : stop]
