"""Explanations by a separate copy of the model, loaded on first use.

One thread computes them, one text after the other and at low priority, so that plain requests are
not delayed. Few requests may wait; others are refused at once.
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
from cluster.errors import InternalError, OverloadedError, RequestError, UnavailableError

log = logging.getLogger(__name__)

MAX_OPEN = 8
"""Requests being explained or waiting; explaining a text takes as long as classifying about 50."""
NICENESS = 10
RETRY_AFTER_S = 5.0


class _CancelledError(Exception):
    """The client disconnected."""


class Explainer:
    """Explains texts in a thread; used on one event loop.

    Args:
        load: Loads the explaining model; called in the thread on first use.
    """

    def __init__(self, load: Callable[[], ExplainModel]) -> None:
        self._load = load
        self._model: ExplainModel | None = None
        self._pool = ThreadPoolExecutor(1, "tandem-explain", initializer=_lower_priority)
        self._open = 0
        self._stopping = threading.Event()

    async def explain(self, texts: Sequence[Text], question: Question) -> list[Explanation]:
        """Explain each text; long ones are cut. Cancelling ends the work.

        Raises:
            InvalidRequestError: The model does not support the method.
            OverloadedError: Too many requests for explanations are open.
            UnavailableError: The engine is stopping.
            InternalError: The model could not be loaded, or failed.
        """
        self._check_running()
        if self._open >= MAX_OPEN:
            message = f"{self._open} requests for explanations are open; the limit is {MAX_OPEN}"
            raise OverloadedError(message, retry_after_s=RETRY_AFTER_S)
        cancelled = threading.Event()
        self._open += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._work, texts, question, cancelled)
        finally:
            cancelled.set()
            self._open -= 1

    async def stop(self) -> None:
        """Fail open requests and end the thread; safe to call twice."""
        self._stopping.set()
        await asyncio.to_thread(self._pool.shutdown)

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise UnavailableError("the engine is stopping", retry_after_s=1.0)

    def _work(
        self, texts: Sequence[Text], question: Question, cancelled: threading.Event
    ) -> list[Explanation]:
        def check() -> None:
            self._check_running()
            if cancelled.is_set():
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


def _lower_priority() -> None:
    """Limit the calling thread to one core and to CPU time that other threads leave."""
    torch.set_num_threads(1)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # per thread on Linux
