"""Accounting of one replica: its meter, read periodically, and its ledger."""

import asyncio
import time

from cluster.accounting import REASONS
from cluster.accounting.ledger import Ledger, RequestWork
from cluster.accounting.meter import Meter
from cluster.asgi import Scope, usage_of
from cluster.metrics import Registry, table
from cluster.periodic import Periodic

_TENANT = b"x-tandem-tenant"


class ReplicaAccounting:
    """Energy and cost of a replica's requests; call ``close`` at the end.

    Does nothing if there is neither a meter nor a price. Divides every ``interval_s`` seconds.
    """

    def __init__(self, model: str, meter: Meter, price_per_s: float, interval_s: float) -> None:
        self._model = model
        self._meter = meter
        self._interval_s = interval_s
        self._priced = False
        self._ledger: Ledger | None = None
        self._periodic: Periodic | None = None
        self._divided_at = time.monotonic()
        self.set_price(price_per_s)

    def set_price(self, price_per_s: float) -> None:
        """Set the price of the replica per second; it applies from the last division on."""
        self._priced = self._priced or price_per_s > 0
        if self._ledger is not None:
            self._ledger.price_per_s = price_per_s
        elif self._meter.has_joules or self._priced:
            self._divided_at = time.monotonic()
            self._ledger = Ledger(price_per_s)
            self._periodic = Periodic("accounting", self._interval_s, self.divide)

    def open_request(self, scope: Scope) -> RequestWork | None:
        """Return an account for a request, to be ended by the caller; None if accounting is off."""
        usage = usage_of(scope)
        if self._ledger is None:
            usage.source = self._meter.source
            return None
        tenant = next((value for name, value in scope["headers"] if name == _TENANT), b"")
        return self._ledger.open_request(usage, tenant.decode("latin-1"))

    async def divide(self) -> None:
        assert self._ledger is not None
        measurement = await asyncio.to_thread(self._meter.read)
        now = time.monotonic()
        self._ledger.divide(now - self._divided_at, measurement)
        self._divided_at = now

    def observe(self, registry: Registry) -> None:
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
        """Stop; energy and cost since the last division are not charged to anyone."""
        if self._periodic is not None:
            await self._periodic.close()
