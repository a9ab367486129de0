"""Tokenizer stage: a thread between the event loop and the queue.

The thread takes all waiting texts at once, up to ``PASS_CHARS`` per job. Many small jobs then cost
one tokenizer call, and a large job does not delay them. The stage owns its jobs until it puts them
in the queue or fails them.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.engines.classifier.model.tokenizer import TextReader
from cluster.engines.classifier.model.types import num_chars
from cluster.engines.classifier.serving.jobs import Job
from cluster.engines.classifier.serving.queue import JobQueue
from cluster.errors import InternalError, InvalidRequestError, RequestError

log = logging.getLogger(__name__)

PASS_CHARS = 50_000
"""Characters of one job that are tokenized before other jobs continue; takes about 10 ms."""

Fail = Callable[[Job, RequestError], None]


@dataclass(slots=True)
class _Piece:
    """Texts ``first`` to ``stop`` of a job."""

    job: Job
    first: int
    stop: int


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
        self.tokenize_s = 0.0
        """Tokenizing time since the start."""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tandem-tokenizer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take over an admitted job."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """End the thread; jobs still waiting are left as they are."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next_jobs():
            pieces = [self._next_piece(job) for job in jobs if not self._drop_if_cancelled(job)]
            for same_reader in _by_reader(pieces):
                started_s = time.perf_counter()
                tokenized = self._tokenize(same_reader)
                self.tokenize_s += time.perf_counter() - started_s
                for piece in tokenized:
                    self._queue_or_resubmit(piece.job)

    def _next_jobs(self) -> list[Job]:
        with self._changed:
            while not self._jobs and not self._stopping:
                self._changed.wait()
            jobs = [] if self._stopping else list(self._jobs)
            self._jobs.clear()
            return jobs

    def _drop_if_cancelled(self, job: Job) -> bool:
        if job.cancelled:
            self._queue.drop_job(job)
        return job.cancelled

    def _next_piece(self, job: Job) -> _Piece:
        first = stop = job.num_tokenized
        chars = 0
        while stop < len(job.texts) and chars < PASS_CHARS:
            chars += num_chars(job.texts[stop])
            stop += 1
        return _Piece(job, first, stop)

    def _tokenize(self, pieces: list[_Piece]) -> list[_Piece]:
        """Tokenize pieces that share a reader, and return those that did not fail."""
        if len(pieces) == 1:
            return pieces if self._tokenize_alone(pieces[0]) else []
        texts = [text for piece in pieces for text in piece.job.texts[piece.first : piece.stop]]
        try:
            rows = iter(pieces[0].job.reader.read(texts, 0))
        except Exception:  # find out whose text it was
            return [piece for piece in pieces if self._tokenize_alone(piece)]
        for piece in pieces:  # a shared reader makes one row per text
            piece.job.ids.extend(next(rows) for _ in range(piece.first, piece.stop))
            piece.job.num_tokenized = piece.stop
        return pieces

    def _tokenize_alone(self, piece: _Piece) -> bool:
        """Tokenize one piece; on an error, fail its job and return False."""
        job = piece.job
        try:
            job.ids += job.reader.read(job.texts[piece.first : piece.stop], piece.first)
            job.num_tokenized = piece.stop
        except RequestError as error:
            self._drop_and_fail(job, error)
        except (TypeError, UnicodeError):
            invalid = InvalidRequestError("input is not valid Unicode", param="input")
            self._drop_and_fail(job, invalid)
        except Exception:
            log.exception("the tokenizer failed")
            self._drop_and_fail(job, InternalError("the tokenizer failed"))
        else:
            return True
        return False

    def _queue_or_resubmit(self, job: Job) -> None:
        if job.num_tokenized < len(job.texts):
            return self.submit(job)
        job.tokenized_s = time.perf_counter()
        try:
            self._queue.put_job(job)
        except RequestError as error:
            self._fail(job, error)

    def _drop_and_fail(self, job: Job, error: RequestError) -> None:
        self._queue.drop_job(job)
        self._fail(job, error)


def _by_reader(pieces: list[_Piece]) -> list[list[_Piece]]:
    groups: dict[TextReader, list[_Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.job.reader, []).append(piece)
    return list(groups.values())
