"""Money budgets of tenants and keys, by UTC day and month. Pure.

A request is admitted while its tenant and its key have not spent their budgets. Its cost is known
when it ends, so what is in flight at that moment may overdraw a budget.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

Period = Literal["day", "month"]
BudgetState = Literal["open", "soft", "spent"]
TENANT = ""
"""Key under which the spend of a whole tenant is counted."""
DAY_S = 86400


@dataclass(frozen=True, slots=True)
class Budget:
    """Budget of a tenant or a key, in the configured currency; None: no limit."""

    cost_per_day: float | None = None
    cost_per_month: float | None = None
    soft_share: float = 0.8
    """Share of a budget (0 to 1) at which it counts as nearly spent."""

    def limits(self) -> Iterator[tuple[Period, float]]:
        """Yield the periods that have a limit."""
        if self.cost_per_day is not None:
            yield "day", self.cost_per_day
        if self.cost_per_month is not None:
            yield "month", self.cost_per_month

    @property
    def is_limited(self) -> bool:
        """True if there is any limit."""
        return self.cost_per_day is not None or self.cost_per_month is not None

    def state(self, spent: float, limit: float) -> BudgetState:
        """Return the state of one period's budget."""
        if spent >= limit:
            return "spent"
        return "soft" if spent >= self.soft_share * limit else "open"


NO_BUDGET = Budget()


class SpendRow(NamedTuple):
    """Cost of one key of one tenant on one day."""

    day: int
    """Days since 1970 in UTC."""
    tenant: str
    key: str
    """Id of the key; empty if the request had none."""
    cost: float


def period_days(period: Period, utc_s: float) -> tuple[int, int]:
    """Return the first day of the present period, and the first day after it."""
    day = int(utc_s // DAY_S)
    if period == "day":
        return day, day + 1
    first = datetime.fromtimestamp(utc_s, UTC).replace(day=1)
    after = (first + timedelta(days=31)).replace(day=1)
    return _day_of(first), _day_of(after)


def _day_of(time: datetime) -> int:
    return int(time.timestamp() // DAY_S)
