"""The accounts of one replica: its meter, read every few seconds, and the ledger that divides."""

import asyncio
import time

from cluster.accounting import REASONS
from cluster.accounting.ledger import Ledger, RequestWork
from cluster.accounting.meter import Meter
from cluster.asgi import Scope, usage_of
from cluster.metrics import Registry, table
from cluster.periodic import Periodic

_TENANT = b"x-tandem-tenant"


class Accounts:
    """Accounts for a replica's requests where there is something to divide; ``close`` is due.

    Args:
        model: The pool's name.
        meter: What reads the replica's use.
        price_per_s: What the replica costs a second.
        interval_s: How often it is divided.
    """

    def __init__(self, model: str, meter: Meter, price_per_s: float, interval_s: float) -> None:
        self._model = model
        self._meter = meter
        self._priced = price_per_s > 0
        self._ledger: Ledger | None = None
        self._periodic: Periodic | None = None
        if meter.counts or self._priced:
            self._ledger = Ledger(price_per_s)
            self._periodic = Periodic("accounting", interval_s, self.divide)
        self._divided_at = time.monotonic()

    def begin(self, scope: Scope) -> RequestWork | None:
        """A request begins; ``end`` of what is returned is due. None: nothing is divided."""
        usage = usage_of(scope)
        if self._ledger is None:
            usage.source = self._meter.source
            return None
        tenant = next((value for name, value in scope["headers"] if name == _TENANT), b"")
        return self._ledger.begin(usage, tenant.decode("latin-1"))

    async def divide(self) -> None:
        """Divide what was used since the last time."""
        assert self._ledger is not None
        measured = await asyncio.to_thread(self._meter.read)
        now = time.monotonic()
        self._ledger.divide(now - self._divided_at, measured)
        self._divided_at = now

    def observe(self, registry: Registry) -> None:
        """Write the sums by tenant into the registry."""
        if self._ledger is None:
            return
        source = self._ledger.source
        for tenant, sums in self._ledger.sums.items():
            if source not in REASONS:
                energy = registry.counter(table.ENERGY, self._model, tenant, source)
                energy.value = sums.joules
            if self._priced:
                registry.counter(table.COST, self._model, tenant).value = sums.cost

    async def close(self) -> None:
        """End the dividing; what was used since the last time belongs to nobody."""
        if self._periodic is not None:
            await self._periodic.close()
