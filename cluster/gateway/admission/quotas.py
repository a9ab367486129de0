"""Quotas of all tenants at one router, and the counts of their requests.

Each router grants its share of every quota (``cluster.admission.leases``); ``quota_sync`` exchanges
the reports from which the shares are computed.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.admission import Counted, Identity, QuotaRefusal, Tenant, TenantQuota
from cluster.admission.leases import Demand, PeerReports, QuotaReport, TenantReport
from cluster.admission.limits import DAY_S
from cluster.errors import OverloadedError, QuotaExhaustedError
from cluster.gateway.admission.budgets import Budgets
from cluster.gateway.recording.request_log import ABANDONED
from cluster.metrics import Counter, Registry, table
from cluster.usage import Usage

_QUOTA_NAMES = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "max_concurrent": "concurrent requests",
    "tokens_per_day": "tokens per day",
}


@dataclass(slots=True)
class QuotaTicket:
    """One request that its tenant's quotas admitted; ``end`` it once."""

    quotas: "TenantQuotas"
    account: TenantQuota
    model: str
    estimated_tokens: float
    prompt_tokens: float
    """The prompt's part of the estimate."""
    identity: Identity
    counted: Counted = Counted.ALL
    """Limits that count the request beside its tokens."""

    def end(self, status: int, usage: Usage | None, had_slot: bool) -> None:
        """Charge the request's usage instead of its estimate; a failed request is free.

        Without a usage, a disconnect or timeout is charged the whole estimate if the request
        ``had_slot``, and a success its prompt.
        """
        if usage is not None:
            charged = float(usage.total_tokens)
        elif status in ABANDONED:
            charged = self.estimated_tokens if had_slot else 0.0
        else:
            charged = self.prompt_tokens if status < 400 else 0.0
        self.account.release(self.estimated_tokens, charged, self.counted)
        if usage is not None and self.quotas.budgets is not None:
            self.quotas.budgets.add(self.identity, usage.cost)
        self.quotas.count(self.account.tenant.name, self.model, status, usage)


class TenantQuotas:
    """Quotas of all tenants; counts their requests and tokens."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.accounts: dict[str, TenantQuota] = {}
        """Account of each tenant that sent a request, by name."""
        self._demands: dict[str, Demand] = {}
        self._served: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._request_counters: dict[tuple[str, int], Counter] = {}
        self._token_counters: dict[tuple[str, str], tuple[Counter, Counter]] = {}
        self.budgets: Budgets | None = None
        """Money budgets; None: costs are unlimited."""
        self.peers = PeerReports()
        """Reports of the other routers."""

    def admit(
        self,
        identity: Identity,
        model: str,
        tokens: tuple[float, float],
        *,
        is_batch_line: bool = False,
    ) -> QuotaTicket:
        """Admit a request.

        Args:
            identity: The request's sender.
            model: Pool or adapter.
            tokens: Estimated work, and the prompt's part of it.
            is_batch_line: True if the request leaves room to the tenant's other requests.

        Raises:
            OverloadedError: A quota of the tenant is exhausted, or a budget spent.
        """
        account = self._account(identity.tenant)
        if self.budgets is not None:
            try:
                self.budgets.check(identity)
            except OverloadedError as error:
                labels = identity.tenant.name, str(error.status)
                self._registry.counter(table.TENANT_REQUESTS, *labels).add()
                raise
        estimated_tokens, _ = tokens
        counted = Counted.BATCH_LINE if is_batch_line else _counted(identity)
        refusal = account.try_admit(estimated_tokens, time.monotonic(), time.time(), counted)
        if refusal is not None:
            name = identity.tenant.name
            self._registry.counter(table.LIMITS_HIT, name, refusal.limit).add()
            self._registry.counter(table.TENANT_REQUESTS, name, str(OverloadedError.status)).add()
            raise _quota_exhausted(refusal, identity.tenant)
        return QuotaTicket(self, account, model, *tokens, identity, counted)

    def num_elsewhere(self) -> int:
        """Return the requests that the other routers have at this moment."""
        return self.peers.num_concurrent(time.monotonic())

    def budget_used(self, identity: Identity) -> float | None:
        """Return the used share of the tokens per day, or of a budget if more of that is used.

        None if neither is limited.
        """
        shares = [] if self.budgets is None else [self.budgets.used(identity)]
        if (limit := identity.tenant.limits.tokens_per_day) is not None:
            shares.append(self._account(identity.tenant).cluster_day_tokens / limit)
        return max((share for share in shares if share is not None), default=None)

    def join(self, identity: Identity, model: str) -> QuotaTicket:
        """Admit a request for an answer that an admitted request began; it is always admitted."""
        account = self._account(identity.tenant)
        account.concurrent += 1
        return QuotaTicket(self, account, model, 0.0, 0.0, identity)

    def count(self, tenant: str, model: str, status: int, usage: Usage | None) -> None:
        """Count a finished request."""
        requests = self._request_counters.get((tenant, status))
        if requests is None:
            requests = self._registry.counter(table.TENANT_REQUESTS, tenant, str(status))
            self._request_counters[tenant, status] = requests
        requests.add()
        if usage is not None:
            counters = self._token_counters.get((tenant, model))
            prompt, completion = counters or self._bind_token_counters(tenant, model)
            prompt.add(usage.prompt_tokens)
            completion.add(usage.completion_tokens)
            self._served[tenant][model] += usage.computed_tokens

    def set_tenants(self, identities: Iterable[Identity]) -> None:
        """Apply changed tenants and quotas; a removed tenant is dropped when it is idle."""
        tenants = {identity.tenant.name: identity.tenant for identity in identities}
        for name, account in list(self.accounts.items()):
            if name in tenants:
                account.set_tenant(tenants[name], time.monotonic())
            elif not account.concurrent:
                del self.accounts[name]
                self._demands.pop(name, None)
                self._served.pop(name, None)

    def settle(self, router_id: str) -> QuotaReport:
        """Update this router's share of every quota; return its report for the other routers."""
        now_s, utc_s = time.monotonic(), time.time()
        day = int(utc_s // DAY_S)
        reports = {}
        for name, account in self.accounts.items():
            account.start_day(utc_s)
            demand = self._demands.setdefault(name, Demand(0.0, now_s))
            report = TenantReport(
                demand.update(account.requested_tokens, now_s),
                account.concurrent,
                account.day_tokens,
                dict(self._served[name]),
            )
            lease = self.peers.lease_for(name, report, day, now_s)
            account.settle(lease, now_s)
            reports[name] = report
        return QuotaReport(router_id, day, reports)

    def _account(self, tenant: Tenant) -> TenantQuota:
        account = self.accounts.get(tenant.name)
        if account is None:
            now_s, utc_s = time.monotonic(), time.time()
            lease = self.peers.lease_for(tenant.name, TenantReport(), int(utc_s // DAY_S), now_s)
            account = TenantQuota(tenant, now_s, utc_s, lease.share)
            self.accounts[tenant.name] = account
        return account

    def _bind_token_counters(self, tenant: str, model: str) -> tuple[Counter, Counter]:
        counter = self._registry.counter
        counters = (
            counter(table.TENANT_TOKENS, tenant, model, "prompt"),
            counter(table.TENANT_TOKENS, tenant, model, "completion"),
        )
        self._token_counters[tenant, model] = counters
        return counters


def _counted(identity: Identity) -> Counted:
    """Return what counts a request: a call of an application is part of its sender's request."""
    if not identity.is_delegated:
        return Counted.ALL
    return Counted.CONCURRENT if identity.has_own_slot else Counted.NONE


def _quota_exhausted(refusal: QuotaRefusal, tenant: Tenant) -> QuotaExhaustedError:
    quota = getattr(tenant.limits, refusal.limit)
    return QuotaExhaustedError(
        f"Quota of {quota:g} {_QUOTA_NAMES[refusal.limit]} is exhausted.",
        retry_after_s=refusal.retry_after_s,
    )
