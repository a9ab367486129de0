"""Answers to the lines of batches, errors included."""

import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import NamedTuple

from cluster.errors import (
    InternalError,
    LinkError,
    ReplicaLostError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)
from cluster.gateway.messages import Request, Response, header
from cluster.usage import Usage

logger = logging.getLogger("ray.serve.tandem")

MAX_ATTEMPTS = 4
"""Attempts of a line that ends with a server error; refusals for load do not count."""
MAX_LOST_ATTEMPTS = 10
"""Attempts of a line whose replicas are lost, perhaps because of it: two minutes and a half."""
_LOAD_STATUSES = (429, 503)

Relay = Callable[[Request], Awaitable[Response]]
"""``Gateway.relay``."""


class LineAnswer(NamedTuple):
    """Answer to one attempt of a line."""

    status: int
    body: bytes
    retry_after_s: float = 0.0
    usage: Usage | None = None
    is_lost: bool = False
    """True if a replica may have been lost because of the line."""

    @property
    def is_refusal(self) -> bool:
        """True if the line was refused for load and should be sent again."""
        return self.status in _LOAD_STATUSES and not self.is_lost

    @property
    def max_attempts(self) -> int:
        """Attempts after which such an answer is the line's result."""
        if self.is_lost:
            return MAX_LOST_ATTEMPTS
        is_defect = self.status >= 500 and self.status != UnsupportedError.status
        return MAX_ATTEMPTS if is_defect else 1


def error_answer(error: RequestError) -> LineAnswer:
    """Return the answer that an error is."""
    content = json.dumps(error.body()).encode()
    # A refusal for load says when to try again.
    is_lost = isinstance(error, ReplicaLostError) or (
        isinstance(error, UnavailableError) and error.retry_after_s is None
    )
    return LineAnswer(error.status, content, error.retry_after_s or 0.0, is_lost=is_lost)


async def ask(relay: Relay, request: Request) -> LineAnswer:
    """Return the complete answer to the request of a line; it never fails."""
    usages: list[Usage] = []
    request.on_usage = usages.append
    try:
        response = await relay(request)
        async with aclosing(response.body) as chunks:
            content = b"".join([chunk async for chunk in chunks])
    except RequestError as error:
        return error_answer(error)
    except LinkError as error:
        return error_answer(ReplicaLostError(str(error)))
    except Exception:  # a defect must not end the whole batch
        logger.exception("%s failed", request.id)
        return error_answer(InternalError("Internal error."))
    retry_after = header(response.headers, b"retry-after") or "0"
    pause_s = float(retry_after) if retry_after.isdigit() else 0.0
    return LineAnswer(response.status, content, pause_s, usages[-1] if usages else None)
