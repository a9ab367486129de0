"""Explanations as a service of the engine, by a model of their own that is loaded when needed.

One thread computes them, one text after another and below everything else's priority, so that
plain requests are not held up. Few requests may wait; beyond that they are refused at once. Owns
the thread and the explaining model. All methods are called on one event loop.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from cluster.engines.classifier.explain.attribution import ExplainModel
from cluster.engines.classifier.explain.schema import Explanation, Question
from cluster.engines.classifier.model.types import Text
from cluster.errors import (
    InternalError,
    OverloadedError,
    RequestError,
    UnavailableError,
)

log = logging.getLogger(__name__)

MAX_OPEN = 8
"""Requests being explained or waiting for it; an explanation takes as long as some 50 texts."""
NICENESS = 10
RETRY_AFTER_S = 5.0


class _CancelledError(Exception):
    """The client has left."""


class Explainer:
    """Explains texts in a thread of its own.

    Args:
        load: Makes the explaining model; called in the thread, once it is needed.
    """

    def __init__(self, load: Callable[[], ExplainModel]) -> None:
        self._load = load
        self._model: ExplainModel | None = None
        self._pool = ThreadPoolExecutor(1, "tandem-explain", initializer=_settle)
        self._open = 0
        self._stopping = threading.Event()

    async def explain(self, texts: Sequence[Text], question: Question) -> list[Explanation]:
        """Explain each text; what is longer than the model takes is cut. Cancelling ends the work.

        Args:
            texts: A few, with their pairs or without.
            question: What is asked about each.

        Raises:
            InvalidRequestError: the model cannot be explained so.
            OverloadedError: too many explanations wait already.
            UnavailableError: the engine stops.
            InternalError: the model could not be loaded, or failed.
        """
        self._check_running()
        if self._open >= MAX_OPEN:
            message = f"{self._open} requests for an explanation wait already"
            raise OverloadedError(message, retry_after_s=RETRY_AFTER_S)
        left = threading.Event()
        self._open += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._work, texts, question, left)
        finally:
            left.set()
            self._open -= 1

    async def stop(self) -> None:
        """Fail what is open and end the thread; safe to call twice."""
        self._stopping.set()
        await asyncio.to_thread(self._pool.shutdown)

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise UnavailableError("the engine stops", retry_after_s=1.0)

    def _work(
        self, texts: Sequence[Text], question: Question, left: threading.Event
    ) -> list[Explanation]:
        def check() -> None:
            self._check_running()
            if left.is_set():
                raise _CancelledError

        try:
            check()
            if self._model is None:
                self._model = self._load()
            return [self._model.explain(text, question, check) for text in texts]
        except (RequestError, _CancelledError):
            raise
        except Exception:
            log.exception("an explanation failed")
            raise InternalError("the explanation failed; see the log") from None


def _settle() -> None:
    """Make the thread a quiet one: a single core, and only what others leave of it."""
    torch.set_num_threads(1)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # Linux: of the thread
