"""Every tenant's account at one router: lets requests in, and counts what they took."""

import time
from collections import defaultdict
from collections.abc import Iterable

from cluster.admission import Identity, QuotaRefusal, Tenant, TenantQuota
from cluster.admission.leases import Demand, PeerReports, QuotaReport, TenantReport
from cluster.admission.limits import DAY_S
from cluster.errors import OverloadedError
from cluster.gateway.recording.request_log import CLIENT_LEFT
from cluster.metrics import Counter, Registry, table
from cluster.usage import Usage

_LIMITS = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "max_concurrent": "requests at a time",
    "tokens_per_day": "tokens per day",
}


class QuotaTicket:
    """One request that its tenant's limits have let in; ``end`` it once."""

    __slots__ = ("_account", "_estimate", "_ledger", "_model", "_prompt_estimate")

    def __init__(
        self,
        ledger: "TenantQuotas",
        account: TenantQuota,
        model: str,
        estimate: float,
        prompt: float,
    ) -> None:
        self._ledger = ledger
        self._account = account
        self._model = model
        self._estimate = estimate
        self._prompt_estimate = prompt

    def end(self, status: int, usage: Usage | None) -> None:
        """The request has ended: it is charged what it took, or where that is unknown, the guess.

        One that failed is charged nothing.
        """
        if usage is not None:
            taken = float(usage.prompt_tokens + usage.completion_tokens)
        elif status == CLIENT_LEFT:
            taken = self._estimate
        else:
            taken = self._prompt_estimate if status < 400 else 0.0
        self._account.release(self._estimate, taken)
        self._ledger.count(self._account.tenant.name, self._model, status, usage)


def work_of(usage: Usage) -> float:
    """The tokens that had to be computed for a request."""
    return float(usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens)


class TenantQuotas:
    """The accounts of all tenants, this router's part of their limits, and its counts."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._accounts: dict[str, TenantQuota] = {}
        self._demands: dict[str, Demand] = {}
        self._served: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._ended: dict[tuple[str, int], Counter] = {}  # the counters, bound once
        self._tokens: dict[tuple[str, str], tuple[Counter, Counter]] = {}
        self.peers = PeerReports()

    def enter(self, identity: Identity, model: str, tokens: float, prompt: float) -> QuotaTicket:
        """Let a request in.

        Args:
            identity: Whose it is.
            model: Its pool, or an adapter there.
            tokens: Its estimated work.
            prompt: The part of it that is its prompt.

        Raises:
            OverloadedError: a limit of the tenant is reached.
        """
        account = self._account(identity.tenant)
        refusal = account.try_admit(tokens, time.monotonic(), time.time())
        if refusal is not None:
            name = identity.tenant.name
            self._registry.counter(table.LIMITS_HIT, name, refusal.limit).add()
            self._registry.counter(table.TENANT_REQUESTS, name, str(OverloadedError.status)).add()
            raise _limited(refusal, identity.tenant)
        return QuotaTicket(self, account, model, tokens, prompt)

    def count(self, tenant: str, model: str, status: int, usage: Usage | None) -> None:
        """Count a request that has ended."""
        ended = self._ended.get((tenant, status))
        if ended is None:
            ended = self._registry.counter(table.TENANT_REQUESTS, tenant, str(status))
            self._ended[tenant, status] = ended
        ended.add()
        if usage is not None:
            prompt, completion = self._tokens.get((tenant, model)) or self._bind(tenant, model)
            prompt.add(usage.prompt_tokens)
            completion.add(usage.completion_tokens)
            self._served[tenant][model] += work_of(usage)

    def _bind(self, tenant: str, model: str) -> tuple[Counter, Counter]:
        counter = self._registry.counter
        bound = (
            counter(table.TENANT_TOKENS, tenant, model, "prompt"),
            counter(table.TENANT_TOKENS, tenant, model, "completion"),
        )
        self._tokens[tenant, model] = bound
        return bound

    def change(self, identities: Iterable[Identity]) -> None:
        """Take other tenants and limits; who is gone is forgotten once nothing of it runs."""
        tenants = {identity.tenant.name: identity.tenant for identity in identities}
        for name, account in list(self._accounts.items()):
            if name in tenants:
                account.set_tenant(tenants[name], time.monotonic())
            elif not account.concurrent:
                del self._accounts[name]
                self._demands.pop(name, None)
                self._served.pop(name, None)

    def receive(self, report: QuotaReport) -> dict[tuple[str, str], float]:
        """Take in a peer's report; returns what it served since, by tenant and model."""
        return self.peers.add_report(report, time.monotonic())

    def report(self, router: str) -> QuotaReport:
        """What the other routers are to know, and this router's parts of the limits by it."""
        now_s, utc_s = time.monotonic(), time.time()
        day = int(utc_s // DAY_S)
        tenants = {}
        for name, account in self._accounts.items():
            account.start_day(utc_s)
            demand = self._demands.setdefault(name, Demand(0.0, now_s))
            own = TenantReport(
                demand.update(account.requested_tokens, now_s),
                account.concurrent,
                account.day_tokens,
                dict(self._served[name]),
            )
            lease = self.peers.lease_for(name, own, day, now_s)
            account.settle(lease, now_s)
            tenants[name] = own
        return QuotaReport(router, day, tenants)

    def _account(self, tenant: Tenant) -> TenantQuota:
        account = self._accounts.get(tenant.name)
        if account is None:
            now_s, utc_s = time.monotonic(), time.time()
            lease = self.peers.lease_for(tenant.name, TenantReport(), int(utc_s // DAY_S), now_s)
            account = TenantQuota(tenant, now_s, utc_s, lease.share)
            self._accounts[tenant.name] = account
        return account


def _limited(refusal: QuotaRefusal, tenant: Tenant) -> OverloadedError:
    most = getattr(tenant.limits, refusal.limit)
    return OverloadedError(
        f"The limit of {most:g} {_LIMITS[refusal.limit]} is reached.",
        retry_after_s=refusal.retry_after_s,
    )
