"""Usage of finished requests: hourly sums in a file of each node."""

import time
from collections.abc import Callable, Iterable

from cluster.accounting.usage import UsageRow, UsageSums
from cluster.accounting.usage_log import UsageLog
from cluster.admission.budgets import SpendRow
from cluster.config import AccountingConfig, TandemConfig
from cluster.usage import Usage


class UsageAccount:
    """Usage of one router's requests.

    Args:
        config: Configuration of the deployment.
        log: File with the hourly sums of this node.
        clock: Unix time in seconds.
    """

    def __init__(
        self, config: TandemConfig, log: UsageLog, clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config.accounting
        self._log = log
        self.clock = clock

    @property
    def in_answers(self) -> bool:
        """True if every JSON response contains its usage."""
        return self._config.in_answers

    @property
    def currency(self) -> str | None:
        """Currency of costs; None if no price is configured."""
        has_prices = self._config.per_cpu_hour or self._config.per_gpu_hour
        return self._config.currency if has_prices else None

    def reconfigure(self, config: AccountingConfig) -> None:
        """Apply changed settings."""
        self._config = config
        self._log.keep_days = config.keep_days

    def start(self) -> None:
        """Start writing to the file periodically."""
        self._log.start()

    async def close(self) -> None:
        """Write what remains and close the file."""
        await self._log.close()

    def add(self, tenant: str, model: str, usage: Usage) -> None:
        """Add a finished request."""
        sums = UsageSums(
            1,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.joules or 0.0,
            usage.cost or 0.0,
        )
        self._log.add_request(tenant, model, usage.source, sums)

    def add_spend(self, row: SpendRow) -> None:
        """Add the cost of a request to that of its key."""
        self._log.add_spend(row)

    async def find_spend(self, first_day: int) -> list[SpendRow]:
        """Return the costs by key in this node's file; see ``UsageLog.find_spend``."""
        return await self._log.find_spend(first_day)

    async def find(self, start_s: float, end_s: float, tenant: str | None) -> list[UsageRow]:
        """Return the sums of this node's file; see ``UsageLog.find``."""
        return await self._log.find(start_s, end_s, tenant)

    async def find_copies(
        self, start_s: float, end_s: float, tenant: str | None
    ) -> list[tuple[str, UsageRow]]:
        """Return the copies of other nodes' sums; see ``UsageLog.find_copies``."""
        return await self._log.find_copies(start_s, end_s, tenant)

    async def store_copy(self, file_id: str, rows: Iterable[UsageRow]) -> None:
        """Store a copy of another node's sums; see ``UsageLog.store_copy``."""
        await self._log.store_copy(file_id, rows)

    async def file_id(self) -> str:
        """Return the id of this node's file."""
        return await self._log.file_id()
