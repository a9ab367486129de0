"""A tenant's quota at one router: token buckets, concurrency, the daily budget. Pure.

A router enforces its share of each limit (``leases``). A request is admitted while some quota is
left and may overdraw it; the debt delays later requests, so the long-term rate is exact even if
estimates are wrong.
"""

import math
from dataclasses import dataclass
from enum import Flag, auto
from typing import Literal

from cluster.admission.identity import Tenant
from cluster.admission.leases import Lease

LimitName = Literal["requests_per_minute", "tokens_per_minute", "max_concurrent", "tokens_per_day"]

BURST_S = 10.0
"""Capacity of a bucket, as the time in which its rate fills it: the size of a burst."""
DAY_S = 86400.0
_RETRY_CONCURRENT_S = 1.0


class Counted(Flag):
    """Limits that count a request beside its tokens."""

    NONE = 0
    REQUEST = auto()
    """Requests per minute."""
    CONCURRENT = auto()
    """Concurrent requests."""
    ALL = REQUEST | CONCURRENT
    HALF = auto()
    """Requests and tokens per minute, of which it leaves half of a burst to other requests."""
    BATCH_LINE = REQUEST | HALF
    """A line of a batch, whose concurrency spare capacity limits."""


@dataclass(frozen=True, slots=True)
class QuotaRefusal:
    """A limit that is reached, and the time after which a retry can succeed."""

    limit: LimitName
    retry_after_s: float


class TokenBucket:
    """Bucket that fills at a rate up to its burst; a clock that jumps back adds nothing."""

    __slots__ = ("_filled_s", "burst", "level", "rate")

    def __init__(self, rate_per_s: float, now_s: float) -> None:
        self.rate = rate_per_s
        self.burst = max(1.0, rate_per_s * BURST_S)
        self.level = self.burst
        self._filled_s = now_s

    def set_rate(self, rate_per_s: float, now_s: float) -> None:
        """Change the rate from now on; a level above the new burst is cut."""
        self.fill(now_s)
        self.rate = rate_per_s
        self.burst = max(1.0, rate_per_s * BURST_S)
        self.level = min(self.level, self.burst)

    def fill(self, now_s: float) -> None:
        """Add what the time since the last call brought."""
        self.level = min(self.burst, self.level + self.rate * max(0.0, now_s - self._filled_s))
        self._filled_s = now_s

    def wait_s(self, amount: float) -> float:
        """Return the time until the level reaches ``amount``."""
        missing = amount - self.level
        if missing <= 0:
            return 0.0
        return missing / self.rate if self.rate > 0 else DAY_S


class TenantQuota:
    """One tenant's usage and limits at one router.

    Args:
        tenant: The tenant with its limits in the whole cluster.
        now_s: Current time on a monotonic clock, as everywhere here.
        utc_s: Unix time, for the daily budget.
        share: This router's share of the limits, until ``settle``.
    """

    def __init__(self, tenant: Tenant, now_s: float, utc_s: float, share: float = 1.0) -> None:
        self.tenant = tenant
        self.concurrent = 0
        """Admitted requests that have not ended."""
        self.requested_tokens = 0.0
        """Tokens ever requested, refused requests included: the tenant's demand."""
        self.day = int(utc_s // DAY_S)
        self.day_tokens = 0.0
        """Tokens used today at this router."""
        self.share = share
        self._peers_concurrent = 0
        self._peers_day_tokens = 0.0
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self._apply_limits(now_s)

    def set_tenant(self, tenant: Tenant, now_s: float) -> None:
        """Apply changed limits from now on; usage so far stays counted."""
        if tenant != self.tenant:
            self.tenant = tenant
            self._apply_limits(now_s)

    def settle(self, lease: Lease, now_s: float) -> None:
        """Apply a new lease."""
        self.share = lease.share
        self._peers_concurrent = lease.peers_concurrent
        self._peers_day_tokens = lease.peers_day_tokens
        self._apply_limits(now_s)

    @property
    def cluster_day_tokens(self) -> float:
        """Tokens used today at all routers."""
        return self.day_tokens + self._peers_day_tokens

    def try_admit(
        self, tokens: float, now_s: float, utc_s: float, counted: Counted = Counted.ALL
    ) -> QuotaRefusal | None:
        """Admit a request of an estimated size, or return the limit that forbids it."""
        self.start_day(utc_s)
        self.requested_tokens += tokens
        refusal = self._find_refusal(now_s, utc_s, counted)
        if refusal is None:
            self.concurrent += Counted.CONCURRENT in counted
            self.day_tokens += tokens
            if self._requests is not None and Counted.REQUEST in counted:
                self._requests.level -= 1
            if self._tokens is not None:
                self._tokens.level -= tokens
        return refusal

    def release(
        self, estimated_tokens: float, used_tokens: float, counted: Counted = Counted.ALL
    ) -> None:
        """End an admitted request and replace its estimate by its usage."""
        self.concurrent -= Counted.CONCURRENT in counted
        self.day_tokens = max(0.0, self.day_tokens + used_tokens - estimated_tokens)
        if self._tokens is not None:
            level = self._tokens.level + estimated_tokens - used_tokens
            self._tokens.level = min(self._tokens.burst, level)

    def start_day(self, utc_s: float) -> None:
        """Reset the daily usage if a new day has begun."""
        day = int(utc_s // DAY_S)
        if day > self.day:  # a clock that jumps back does not start a new day
            self.day, self.day_tokens, self._peers_day_tokens = day, 0.0, 0.0
            self._update_bounds()

    def _find_refusal(self, now_s: float, utc_s: float, counted: Counted) -> QuotaRefusal | None:
        limits = self.tenant.limits
        is_full = limits.max_concurrent is not None and self.concurrent >= self._max_concurrent
        if is_full and Counted.CONCURRENT in counted:
            return QuotaRefusal("max_concurrent", _RETRY_CONCURRENT_S)
        if limits.tokens_per_day is not None and self.day_tokens >= self._max_day_tokens:
            return QuotaRefusal("tokens_per_day", max(1.0, (self.day + 1) * DAY_S - utc_s))
        reserve = 0.5 if Counted.HALF in counted else 0.0
        if self._requests is not None and Counted.REQUEST in counted:
            self._requests.fill(now_s)
            needed = max(1.0, reserve * self._requests.burst)
            if (wait_s := self._requests.wait_s(needed)) > 0:
                return QuotaRefusal("requests_per_minute", wait_s)
        if self._tokens is not None:
            self._tokens.fill(now_s)
            if self._tokens.level <= (kept := reserve * self._tokens.burst):
                return QuotaRefusal("tokens_per_minute", self._tokens.wait_s(kept + 1.0))
        return None

    def _apply_limits(self, now_s: float) -> None:
        limits = self.tenant.limits
        self._requests = self._bucket(limits.requests_per_minute, self._requests, now_s)
        self._tokens = self._bucket(limits.tokens_per_minute, self._tokens, now_s)
        self._update_bounds()

    def _bucket(
        self, per_minute: float | None, bucket: TokenBucket | None, now_s: float
    ) -> TokenBucket | None:
        """Return the bucket with the rate of this router's share; None if there is no limit."""
        if per_minute is None:
            return None
        rate_per_s = per_minute / 60 * self.share
        if bucket is None:
            return TokenBucket(rate_per_s, now_s)
        bucket.set_rate(rate_per_s, now_s)
        return bucket

    def _update_bounds(self) -> None:
        """Compute this router's bounds of concurrency and of today's tokens."""
        limits = self.tenant.limits
        free = (limits.max_concurrent or 0) - self.concurrent - self._peers_concurrent
        # Rounded up, so that a limit of 1 is usable: at most one request too many per router.
        self._max_concurrent = self.concurrent + max(0, math.ceil(free * self.share))
        left = (limits.tokens_per_day or 0.0) - self.day_tokens - self._peers_day_tokens
        self._max_day_tokens = self.day_tokens + max(0.0, left * self.share)
