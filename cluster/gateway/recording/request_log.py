"""Request log: a JSON line for each finished request, rate-limited, and the last failures.

A line contains no text of the request unless ``log_prompts`` is set. The handler of the logger
``tandem.requests`` is configured by ``deployments.request_log``.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

import msgspec

from cluster.errors import RequestTimeoutError, request_error_for

LOGGER = "tandem.requests"
CLIENT_DISCONNECTED = 499
"""Status of a request whose client disconnected; counted and logged, never sent."""
ABANDONED = (CLIENT_DISCONNECTED, RequestTimeoutError.status)
"""Statuses of requests whose work was cancelled: by a disconnect, or at the client's deadline."""
MAX_FAILURES = 50
MAX_PROMPT_CHARS = 2000

logger = logging.getLogger(LOGGER)

Outcome = Literal["ok", "left", "refused", "failed", "cut_off"]
"""``left``: the client disconnected."""
Replay = Literal["joined", "finished", "rejected"]
"""Use of an `Idempotency-Key` that had been used: the request got the running or the finished
answer, or was rejected because it is another request."""


class RequestRecord(msgspec.Struct):
    """A finished request; unknown values are None."""

    id: str
    route: str
    status: int
    outcome: Outcome
    tenant: str = ""
    model: str = ""
    """Pool; empty if the request was rejected before one was selected."""
    replica: str | None = None
    """The last replica at which the request had a slot."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    queue_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    handovers: int | None = None
    """Times that another replica continued the answer; None if it was one replica's."""
    replay: Replay | None = None
    """Set if the `Idempotency-Key` had been used before."""
    hedge: Literal["won", "lost"] | None = None
    """Set if the request was sent to a second replica: ``won`` if that one answered first."""
    trial: bool | None = None
    """True if the request was a trial of a replica that had been taken out."""
    guards: str | None = None
    """Results of the guards that found something or failed: `personal-data=redacted`."""


class Failure(msgspec.Struct):
    """A failed or rejected request, without its text."""

    time: float
    """Unix time of its end."""
    id: str
    model: str
    """Pool; empty if the request was rejected before one was selected."""
    route: str
    status: int
    type: str
    tenant: str = ""
    """Sender; empty if no key is required, or none was accepted."""


def outcome_of(status: int, *, cut_off: bool = False) -> Outcome:
    """Return the outcome of a request by the status of its response."""
    if cut_off:
        return "cut_off"
    if status == CLIENT_DISCONNECTED:
        return "left"
    return "failed" if status >= 500 else "refused" if status >= 400 else "ok"


class RequestLog:
    """Log of one router's requests.

    Args:
        lines_per_s: Limit on lines per second for requests that ended well, and the same limit
            again for all others.
        log_prompts: True to include the beginning of each request's body.
        clock: Monotonic clock, in seconds.
    """

    def __init__(
        self,
        lines_per_s: float,
        *,
        log_prompts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lines_per_s = -1.0
        self.reconfigure(lines_per_s, log_prompts=log_prompts)
        self._skipped = 0
        self._failed: deque[Failure] = deque(maxlen=MAX_FAILURES)
        self._refused: deque[Failure] = deque(maxlen=MAX_FAILURES)

    def reconfigure(self, lines_per_s: float, *, log_prompts: bool) -> None:
        """Change the limit and the content of the lines."""
        self._log_prompts = log_prompts
        if lines_per_s != self._lines_per_s:
            self._lines_per_s = lines_per_s
            self._ok_limit = _RateLimit(lines_per_s, self._clock)
            self._failure_limit = _RateLimit(lines_per_s, self._clock)

    @property
    def failures(self) -> list[Failure]:
        """The last failed and the last refused requests, oldest first."""
        return sorted((*self._failed, *self._refused), key=lambda failure: failure.time)

    def wants(self, outcome: Outcome) -> bool:
        """Return whether to call ``write``; call this once per request, as it uses up the limit."""
        if outcome not in ("ok", "left") or self._ok_limit.allows():
            return True
        self._skipped += 1
        return False

    def write(self, record: RequestRecord, body: bytes = b"") -> None:
        """Log a request, and remember it if it failed or was refused."""
        has_failed = record.outcome in ("failed", "cut_off")
        if has_failed or record.outcome == "refused":
            (self._failed if has_failed else self._refused).append(_failure(record))
            if not self._failure_limit.allows():
                self._skipped += 1
                return
        level = logging.WARNING if has_failed else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "%s", self._line(record, body))

    def _line(self, record: RequestRecord, body: bytes) -> str:
        line: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        fields = msgspec.structs.asdict(record).items()
        line |= {key: value for key, value in fields if value is not None and value != ""}
        if self._skipped:
            line["skipped"], self._skipped = self._skipped, 0
        if self._log_prompts:  # a character has at most 4 bytes
            line["body"] = body[: 4 * MAX_PROMPT_CHARS].decode(errors="replace")[:MAX_PROMPT_CHARS]
        return msgspec.json.encode(line).decode()


def _failure(record: RequestRecord) -> Failure:
    is_cut_off = record.outcome == "cut_off"
    kind = "CutOff" if is_cut_off else request_error_for(record.status, "").type
    return Failure(
        *(time.time(), record.id, record.model, record.route, record.status, kind, record.tenant)
    )


class _RateLimit:
    """Token bucket with a burst of one second's events."""

    def __init__(self, rate_per_s: float, clock: Callable[[], float]) -> None:
        self._rate_per_s = rate_per_s
        self._burst = max(1.0, rate_per_s) if rate_per_s else 0.0
        self._tokens = self._burst
        self._clock = clock
        self._updated_s = clock()

    def allows(self) -> bool:
        now_s = self._clock()
        grown = (now_s - self._updated_s) * self._rate_per_s
        self._tokens = min(self._burst, self._tokens + grown)
        self._updated_s = now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
