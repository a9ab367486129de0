"""Who asks, and what it may: a tenant's share and limits, and what its key narrows."""

from dataclasses import dataclass, field

MIN_PRIORITY, MAX_PRIORITY = -8, 8
"""Classes of requests; higher goes first, 0 is usual."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may take from the whole cluster, all its keys together; None: no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_ongoing: int | None = None
    """Requests at a time, waiting ones included."""
    tokens_per_day: float | None = None
    """Of UTC."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One party among which capacity is shared."""

    name: str
    weight: float = 1.0
    """Its share beside the others'; 0: served only when nobody else waits."""
    limits: TenantLimits = field(default_factory=TenantLimits)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a request comes from, and what its key allows."""

    tenant: Tenant
    priority: int = 0
    """The highest class that its requests may have, and the one that they have."""
    models: frozenset[str] | None = None
    """The models that it may use; None: every one."""

    def allows(self, model: str) -> bool:
        """Whether it may use the model of this name."""
        return self.models is None or model in self.models


OPEN = Identity(Tenant(""))
"""Whoever asks where no key is needed."""
