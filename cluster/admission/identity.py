"""Tenants, their limits, and the rights of an API key."""

from dataclasses import dataclass, field

from cluster.admission.budgets import NO_BUDGET, Budget

MIN_PRIORITY, MAX_PRIORITY = -8, 8
"""Bounds of a request's priority; higher is served first, the default is 0."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """Limits of a tenant in the whole cluster, over all its keys; None: no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_concurrent: int | None = None
    """Requests at the same time, queued ones included."""
    tokens_per_day: float | None = None
    """Tokens per day in UTC."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A party that shares the cluster with others."""

    name: str
    weight: float = 1.0
    """Share of the capacity, relative to other tenants; 0: served only if no other waits."""
    limits: TenantLimits = field(default_factory=TenantLimits)
    budget: Budget = NO_BUDGET


@dataclass(frozen=True, slots=True)
class Identity:
    """Tenant of a request, and the rights of its key."""

    tenant: Tenant
    priority: int = 0
    """Highest priority of the key's requests, and their default."""
    models: frozenset[str] | None = None
    """Models that the key may use; None: all."""
    key: str = ""
    """Id of the key; empty without one."""
    budget: Budget = NO_BUDGET
    """Budget of the key, in addition to that of its tenant."""
    is_operator: bool = False
    """True if the key may see the figures and requests of every tenant."""
    is_anonymous: bool = False
    """True for a sender without a valid key, on paths that need none."""
    guards: frozenset[str] | None = None
    """Guards that check the key's requests; None: those that are the default."""
    is_delegated: bool = False
    """True for a call that an application makes for its sender, whose own request was counted."""
    has_own_slot: bool = True
    """False for such a call that uses the concurrent slot of the sender's request."""

    @property
    def sees_all(self) -> bool:
        """True for operators, for everyone if no key is required, and inside the cluster."""
        return self.is_operator or not (self.tenant.name or self.is_anonymous)

    def allows(self, *names: str) -> bool:
        """Return True if the key may use the model with these names."""
        return self.models is None or not self.models.isdisjoint(names)


OPEN = Identity(Tenant(""))
"""Identity of all requests if no key is required."""
ANONYMOUS = Identity(Tenant(""), is_anonymous=True)
"""Identity of requests without a valid key, on paths that need none."""
