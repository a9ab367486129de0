"""Divides what a replica used among its requests, by their share of the engine's work. Pure.

Owns the requests that are being served and the sums by tenant. Every joule that was measured goes
to exactly one tenant; those of intervals without work go to ``IDLE``.
"""

from dataclasses import dataclass

from cluster.accounting import ANONYMOUS, IDLE, LEARNING, OTHER, REASONS
from cluster.accounting.costs import TokenCosts, Work
from cluster.usage import UsageCounter

MAX_TENANTS = 500


@dataclass(frozen=True, slots=True)
class Measured:
    """What a replica used in one interval."""

    joules: float | None
    """None: nothing measures them."""
    cpu_s: float
    """CPU time of the replica's processes."""
    source: str
    """What measured the joules, or why there are none (``REASONS``)."""


@dataclass(slots=True)
class Sums:
    """What a tenant used of one replica."""

    joules: float = 0.0
    cost: float = 0.0


class RequestWork:
    """One request of a replica; ``end`` is due."""

    __slots__ = ("_decode", "_ledger", "_prefill", "cost", "ended", "joules", "tenant", "usage")

    def __init__(self, ledger: "Ledger", usage: UsageCounter, tenant: str) -> None:
        self.usage = usage
        self.tenant = tenant
        self.joules = 0.0
        """Divided so far."""
        self.cost = 0.0
        self.ended = False
        self._ledger = ledger
        self._prefill = 0
        self._decode = 0

    def due(self) -> Work:
        """The tokens since the last ``take``."""
        usage = self.usage
        # Cached tokens may become known later than the prompt; what was counted stays counted.
        prefill = max(0, usage.prompt_tokens - usage.cached_tokens - self._prefill)
        return Work(prefill, usage.completion_tokens - self._decode)

    def take(self) -> Work:
        """``due``, which then is divided."""
        work = self.due()
        self._prefill += int(work.prefill)
        self._decode += int(work.decode)
        return work

    def settle(self) -> None:
        """Put the request's figures into its usage; what was not divided yet is estimated."""
        self._ledger.settle(self)

    def end(self) -> None:
        """No further token comes."""
        self.ended = True
        self.usage.settle = None


class Ledger:
    """The accounts of one replica.

    Args:
        price_per_s: What the replica costs a second, in the configured currency.
    """

    def __init__(self, price_per_s: float = 0.0) -> None:
        self.sums: dict[str, Sums] = {}
        """By tenant; ``IDLE``'s too."""
        self.source = LEARNING
        """Of the figures last divided."""
        self.costs = TokenCosts()
        self._price_per_s = price_per_s
        self._cost_per_effort = 0.0
        self._open: list[RequestWork] = []

    def begin(self, usage: UsageCounter, tenant: str) -> RequestWork:
        """A request begins, whose tokens ``usage`` counts."""
        work = RequestWork(self, usage, tenant or ANONYMOUS)
        usage.settle = work.settle
        self._open.append(work)
        return work

    def divide(self, seconds: float, measured: Measured) -> None:
        """Divide what was used since the last call, so many seconds ago."""
        if measured.source != self.source:  # another unit, perhaps
            self.source, self.costs = measured.source, TokenCosts()
        taken = [(request, request.take()) for request in self._open]
        whole = Work(sum(w.prefill for _, w in taken), sum(w.decode for _, w in taken))
        joules = measured.joules
        self.costs.learn(seconds, whole, measured.cpu_s if joules is None else joules)
        joules, cost = joules or 0.0, self._price_per_s * seconds
        shares = _shares(self.costs, taken)
        if not shares:
            self._add(IDLE, joules, cost)
        for request, share in shares:
            request.joules += joules * share
            request.cost += cost * share
            self._add(request.tenant, joules * share, cost * share)
        if effort := self.costs.of(whole):
            self._cost_per_effort = cost / effort
        self._open = [request for request in self._open if not request.ended]

    def settle(self, request: RequestWork) -> None:
        """See ``RequestWork.settle``."""
        usage, due = request.usage, request.due()
        usage.source = self.source if self.costs.known else LEARNING
        if usage.source in REASONS:
            usage.joules = None
        else:
            usage.joules = request.joules + self.costs.of(due)
        if self._price_per_s and self.costs.known:
            usage.cost = request.cost + self._cost_per_effort * self.costs.of(due)

    def _add(self, tenant: str, joules: float, cost: float) -> None:
        if tenant not in self.sums and len(self.sums) >= MAX_TENANTS:
            tenant = OTHER
        sums = self.sums.setdefault(tenant, Sums())
        sums.joules += joules
        sums.cost += cost


def _shares(
    costs: TokenCosts, taken: list[tuple[RequestWork, Work]]
) -> list[tuple[RequestWork, float]]:
    """Each request that was computed, with its share of the effort; they add up to 1."""
    efforts = [(request, costs.of(work)) for request, work in taken]
    if not any(effort for _, effort in efforts):  # only tokens of the kind that seems to be free
        efforts = [(request, work.prefill + work.decode) for request, work in taken]
    whole = sum(effort for _, effort in efforts)
    return [(request, effort / whole) for request, effort in efforts if effort]
