"""A tenant's limits at one router: token buckets, concurrency, the day's budget. Pure.

A router enforces its share of each limit (``leases``). A request is let in while something is
left and may overdraw; the debt delays those after it, so the long-term rate is exact whatever
was estimated.
"""

from dataclasses import dataclass
from typing import Literal

from cluster.admission.identity import Tenant

LimitName = Literal["requests_per_minute", "tokens_per_minute", "max_ongoing", "tokens_per_day"]

BURST_S = 10.0
"""A bucket holds what its rate gives in this time: that much may come at once."""
DAY_S = 86400.0
_RETRY_ONGOING_S = 1.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit is reached, and when trying again makes sense."""

    limit: LimitName
    retry_after_s: float


class TokenBucket:
    """Fills at a rate up to its burst. A clock that jumps back adds nothing."""

    __slots__ = ("_at_s", "burst", "level", "rate")

    def __init__(self, rate_per_s: float, now_s: float) -> None:
        self.rate = rate_per_s
        self.burst = max(1.0, rate_per_s * BURST_S)
        self.level = self.burst
        self._at_s = now_s

    def set_rate(self, rate_per_s: float, now_s: float) -> None:
        """Fill at another rate from now on; what is more than the new burst is lost."""
        self.fill(now_s)
        self.rate = rate_per_s
        self.burst = max(1.0, rate_per_s * BURST_S)
        self.level = min(self.level, self.burst)

    def fill(self, now_s: float) -> None:
        """Add what the time since the last call brought."""
        self.level = min(self.burst, self.level + self.rate * max(0.0, now_s - self._at_s))
        self._at_s = now_s

    def wait_s(self, amount: float) -> float:
        """How long until the level is at ``amount``."""
        missing = amount - self.level
        if missing <= 0:
            return 0.0
        return missing / self.rate if self.rate > 0 else DAY_S


class Account:
    """What one tenant took and may take, at one router."""

    def __init__(self, tenant: Tenant, now_s: float, utc_s: float, share: float = 1.0) -> None:
        self.tenant = tenant
        self.ongoing = 0
        self.asked_tokens = 0.0
        """All that it ever asked for, refused requests included: its demand."""
        self.day = int(utc_s // DAY_S)
        self.day_tokens = 0.0
        """What it took today, here."""
        self.share = share
        """This router's part of the limits."""
        self._peers_ongoing = 0
        self._peers_day_tokens = 0.0
        self._apply(now_s)

    def change(self, tenant: Tenant, now_s: float) -> None:
        """Take other limits from now on; what was taken stays counted."""
        if tenant != self.tenant:
            self.tenant = tenant
            self._apply(now_s, self._requests, self._tokens)

    def settle(
        self, share: float, peers_ongoing: int, peers_day_tokens: float, now_s: float
    ) -> None:
        """Take this router's new part, and what the other routers have given out."""
        self.share = share
        self._peers_ongoing = peers_ongoing
        self._peers_day_tokens = peers_day_tokens
        self._apply(now_s, self._requests, self._tokens)

    def enter(self, tokens: float, now_s: float, utc_s: float) -> Refusal | None:
        """Let a request of an estimated size in, or say which limit forbids it.

        Args:
            tokens: What it will take, by estimate.
            now_s: On a clock that only goes forward, as everywhere here.
            utc_s: Unix time, for the day's budget.
        """
        self.begin_day(utc_s)
        self.asked_tokens += tokens
        refusal = self._refusal(now_s, utc_s)
        if refusal is None:
            self.ongoing += 1
            self.day_tokens += tokens
            if self._requests is not None:
                self._requests.level -= 1
            if self._tokens is not None:
                self._tokens.level -= tokens
        return refusal

    def leave(self, estimated: float, taken: float) -> None:
        """A request that was let in has ended; its estimate is replaced by what it took."""
        self.ongoing -= 1
        self.day_tokens = max(0.0, self.day_tokens + taken - estimated)
        if self._tokens is not None:
            self._tokens.level = min(self._tokens.burst, self._tokens.level + estimated - taken)

    def _refusal(self, now_s: float, utc_s: float) -> Refusal | None:
        limits = self.tenant.limits
        if limits.max_ongoing is not None and self.ongoing >= self._most_ongoing:
            return Refusal("max_ongoing", _RETRY_ONGOING_S)
        if limits.tokens_per_day is not None and self.day_tokens >= self._most_today:
            return Refusal("tokens_per_day", max(1.0, (self.day + 1) * DAY_S - utc_s))
        if self._requests is not None:
            self._requests.fill(now_s)
            if (wait_s := self._requests.wait_s(1.0)) > 0:
                return Refusal("requests_per_minute", wait_s)
        if self._tokens is not None:
            self._tokens.fill(now_s)
            if self._tokens.level <= 0:
                return Refusal("tokens_per_minute", self._tokens.wait_s(1.0))
        return None

    def begin_day(self, utc_s: float) -> None:
        """Forget what was taken before this day."""
        day = int(utc_s // DAY_S)
        if day > self.day:  # a clock that jumps back starts no day anew
            self.day, self.day_tokens, self._peers_day_tokens = day, 0.0, 0.0
            self._set_most()

    def _apply(
        self, now_s: float, requests: TokenBucket | None = None, tokens: TokenBucket | None = None
    ) -> None:
        limits = self.tenant.limits
        self._requests = _bucket(limits.requests_per_minute, self.share, requests, now_s)
        self._tokens = _bucket(limits.tokens_per_minute, self.share, tokens, now_s)
        self._set_most()

    def _set_most(self) -> None:
        limits = self.tenant.limits
        free = (limits.max_ongoing or 0) - self.ongoing - self._peers_ongoing
        # Rounded up, so that a limit of 1 can be had at all: one too many a router at most.
        self._most_ongoing = self.ongoing + max(0, -int(-free * self.share // 1))
        left = (limits.tokens_per_day or 0.0) - self.day_tokens - self._peers_day_tokens
        self._most_today = self.day_tokens + max(0.0, left * self.share)


def _bucket(
    per_minute: float | None, share: float, old: TokenBucket | None, now_s: float
) -> TokenBucket | None:
    if per_minute is None:
        return None
    rate = per_minute / 60 * share
    if old is None:
        return TokenBucket(rate, now_s)
    old.set_rate(rate, now_s)
    return old
