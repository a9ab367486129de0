"""Division of a replica's energy and cost among its requests, by their share of the work. Pure.

Every measured joule goes to exactly one tenant; idle intervals go to ``IDLE``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cluster.accounting import ANONYMOUS, IDLE, LEARNING, OTHER, REASONS
from cluster.accounting.costs import TokenCosts, Work
from cluster.usage import UsageCounter

MAX_TENANTS = 500


@dataclass(frozen=True, slots=True)
class Measurement:
    """Energy and CPU time of a replica in one interval."""

    joules: float | None
    """Energy; None if it is not measured."""
    cpu_s: float
    """CPU time of the replica's processes."""
    source: str
    """Source of the joules, or the reason why there are none (``REASONS``)."""


@dataclass(slots=True)
class TenantSums:
    """Energy and cost of one tenant at one replica."""

    joules: float = 0.0
    cost: float = 0.0


@dataclass(slots=True, eq=False)
class RequestWork:
    """Account of one request; call ``end`` after its last token."""

    usage: UsageCounter
    tenant: str
    joules: float = 0.0
    """Energy charged so far."""
    cost: float = 0.0
    """Cost charged so far."""
    estimated_cost: float = 0.0
    """Cost that was reported for work since the last division."""
    ended: bool = False
    _prefill: int = 0
    _decode: int = 0

    def uncharged_work(self) -> Work:
        """Return the tokens since the last ``charge_work``."""
        usage = self.usage
        # Cached tokens may become known after the prompt; work already charged stays charged.
        prefill = max(0, usage.prompt_tokens - usage.cached_tokens - self._prefill)
        return Work(prefill, usage.completion_tokens - self._decode)

    def charge_work(self) -> Work:
        """Return the tokens since the last call."""
        work = self.uncharged_work()
        self._prefill += int(work.prefill)
        self._decode += int(work.decode)
        return work

    def end(self) -> None:
        self.ended = True
        self.usage.settle = None


class Ledger:
    """Accounts of one replica's requests and tenants; prices are in the configured currency."""

    def __init__(
        self, price_per_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.sums: dict[str, TenantSums] = {}
        """Sums by tenant, ``IDLE`` included."""
        self.source = LEARNING
        """Source of the last measurement."""
        self.costs = TokenCosts()
        self.price_per_s = price_per_s
        """Price of the replica, idle or not; may be changed."""
        self._clock = clock
        self._divided_at = clock()
        self._cost_per_effort = 0.0
        self._estimated_cost = 0.0  # of all requests, since the last division
        self._open: list[RequestWork] = []

    def open_request(self, usage: UsageCounter, tenant: str) -> RequestWork:
        work = RequestWork(usage, tenant or ANONYMOUS)
        usage.settle = partial(self.settle, work)
        self._open.append(work)
        return work

    def divide(self, seconds: float, measurement: Measurement) -> None:
        if measurement.source != self.source:  # the unit may have changed, too
            self.source, self.costs = measurement.source, TokenCosts()
        charged = [(request, request.charge_work()) for request in self._open]
        total = Work(sum(w.prefill for _, w in charged), sum(w.decode for _, w in charged))
        joules = measurement.joules
        self.costs.learn(seconds, total, measurement.cpu_s if joules is None else joules)
        joules, cost = joules or 0.0, self.price_per_s * seconds
        shares = _shares(self.costs, charged)
        if not shares:
            self._add(IDLE, joules, cost)
        for request, share in shares:
            request.joules += joules * share
            request.cost += cost * share
            self._add(request.tenant, joules * share, cost * share)
        if effort := self.costs.estimate_effort(total):
            self._cost_per_effort = cost / effort
        self._open = [request for request in self._open if not request.ended]
        self._divided_at, self._estimated_cost = self._clock(), 0.0
        for request in self._open:
            request.estimated_cost = 0.0

    def settle(self, request: RequestWork) -> None:
        """Write energy and cost to the request's usage; the part not charged yet is estimated."""
        usage = request.usage
        effort = self.costs.estimate_effort(request.uncharged_work())
        usage.source = self.source if self.costs.known else LEARNING
        usage.joules = None if usage.source in REASONS else request.joules + effort
        if self.price_per_s and self.costs.known:
            usage.cost = request.cost + self._estimate_cost(request, effort)

    def _estimate_cost(self, request: RequestWork, effort: float) -> float:
        """Return the cost of a request's effort since the last division.

        After a nearly idle interval, an effort costs a multiple of what it costs in a busy one. So
        all estimates together are at most the price of the time.
        """
        others = self._estimated_cost - request.estimated_cost
        left = self.price_per_s * (self._clock() - self._divided_at) - others
        request.estimated_cost = max(0.0, min(left, self._cost_per_effort * effort))
        self._estimated_cost = others + request.estimated_cost
        return request.estimated_cost

    def _add(self, tenant: str, joules: float, cost: float) -> None:
        if tenant not in self.sums and len(self.sums) >= MAX_TENANTS:
            tenant = OTHER
        sums = self.sums.setdefault(tenant, TenantSums())
        sums.joules += joules
        sums.cost += cost


def _shares(
    costs: TokenCosts, charged: list[tuple[RequestWork, Work]]
) -> list[tuple[RequestWork, float]]:
    """Return each request that was computed with its share of the effort; shares add up to 1."""
    efforts = [(request, costs.estimate_effort(work)) for request, work in charged]
    if not any(effort for _, effort in efforts):  # only tokens of a kind with the estimated cost 0
        efforts = [(request, work.prefill + work.decode) for request, work in charged]
    total = sum(effort for _, effort in efforts)
    return [(request, effort / total) for request, effort in efforts if effort]
