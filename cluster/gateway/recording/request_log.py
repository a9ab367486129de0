"""The end of each request: a line in the log, sampled above a rate, and a short memory of failures.

A line is JSON and holds no text of the request, unless that is configured. Owns the limits and
the last failures. Where the logger ``tandem.requests`` writes to, is not known here.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

import msgspec

from cluster.errors import request_error_for

LOGGER = "tandem.requests"
CLIENT_LEFT = 499
"""Not a status that is sent: who would get it has left."""
MAX_FAILURES = 50
MAX_PROMPT_CHARS = 2000

logger = logging.getLogger(LOGGER)

Outcome = Literal["ok", "left", "refused", "failed", "cut_off"]


class RequestRecord(msgspec.Struct):
    """A request that has ended; what is not known of it is None."""

    id: str
    route: str
    status: int
    outcome: Outcome
    tenant: str = ""
    model: str = ""
    """"" where it came to no pool."""
    replica: str | None = None
    """The last at which it had a place."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    queue_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None


class Failure(msgspec.Struct):
    """A request that was not answered as its sender wished; nothing of its text."""

    time: float
    """Unix time of its end."""
    id: str
    model: str
    """"" where it came to no pool."""
    route: str
    status: int
    type: str


def outcome_of(status: int, *, cut_off: bool = False) -> Outcome:
    """How a request ended, by the status of its answer."""
    if cut_off:
        return "cut_off"
    if status == CLIENT_LEFT:
        return "left"
    return "failed" if status >= 500 else "refused" if status >= 400 else "ok"


class RequestLog:
    """Told of the end of every request of one router.

    Args:
        lines_per_s: Lines in a second for requests that ended well, and as many for the others.
        log_prompts: Whether a line has the beginning of the request's body.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        lines_per_s: float,
        *,
        log_prompts: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._usual = _Limit(lines_per_s, clock)
        self._unusual = _Limit(lines_per_s, clock)
        self._log_prompts = log_prompts
        self._skipped = 0
        self._faults: deque[Failure] = deque(maxlen=MAX_FAILURES)
        self._refusals: deque[Failure] = deque(maxlen=MAX_FAILURES)

    @property
    def failures(self) -> list[Failure]:
        """The last requests that failed and the last that were refused, the oldest first."""
        return sorted((*self._faults, *self._refusals), key=lambda failure: failure.time)

    def wants(self, outcome: Outcome) -> bool:
        """Whether ``write`` is to be called for a request; asked once, as that is counted."""
        if outcome not in ("ok", "left") or self._usual.allows():
            return True
        self._skipped += 1
        return False

    def write(self, ended: RequestRecord, body: bytes = b"") -> None:
        """Log a request that is wanted, and remember it where it failed or was refused."""
        fault = ended.outcome in ("failed", "cut_off")
        if fault or ended.outcome == "refused":
            (self._faults if fault else self._refusals).append(_failure(ended))
            if not self._unusual.allows():
                self._skipped += 1
                return
        level = logging.WARNING if fault else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "%s", self._line(ended, body))

    def _line(self, ended: RequestRecord, body: bytes) -> str:
        line: dict[str, object] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        known = msgspec.structs.asdict(ended).items()
        line |= {key: value for key, value in known if value is not None and value != ""}
        if self._skipped:
            line["skipped"], self._skipped = self._skipped, 0
        if self._log_prompts:
            line["body"] = body[: 4 * MAX_PROMPT_CHARS].decode(errors="replace")[:MAX_PROMPT_CHARS]
        return msgspec.json.encode(line).decode()


def _failure(ended: RequestRecord) -> Failure:
    kind = "CutOff" if ended.outcome == "cut_off" else request_error_for(ended.status, "").type
    return Failure(time.time(), ended.id, ended.model, ended.route, ended.status, kind)


class _Limit:
    """So many in a second, and after a pause as many at once."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = max(1.0, rate) if rate else 0.0
        self._left = self._burst
        self._clock = clock
        self._at = clock()

    def allows(self) -> bool:
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
