"""Energy and cost of requests.

replica    accounting of one replica: meter and ledger, run periodically
meter      energy and CPU time of a replica, from the best counters available
counters   energy counters and CPU clocks of this machine
ledger     division of the measured energy and cost among requests; pure
costs      cost per prefill and decode token, learned from measurements; pure
usage      hourly sums by tenant and model, as JSON and CSV; pure
usage_log  file with the hourly sums

A value without a counter is missing, and the reason is reported. Estimates are marked as such.
"""

ANONYMOUS = "_anonymous"
"""Tenant of requests without a tenant."""
IDLE = "_idle"
"""Tenant of energy and cost while no request was computed."""
OTHER = "other"
"""Tenant label beyond the limit on distinct tenants."""

ESTIMATE = "estimate"
"""Source of joules computed from CPU time and a configured power."""
LEARNING = "learning"
"""Source of requests that ended before the replica's first measurement."""
REASONS = {
    "": "energy accounting is disabled (accounting.energy is false)",
    "no-counter": "the machine has neither a GPU energy counter nor RAPL, and "
    "accounting.watts_per_core is not set",
    "rapl-unreadable": "RAPL counters (/sys/class/powercap) are readable by root only",
    "nvml-unsupported": "the GPU has no energy counter (introduced with Volta)",
    LEARNING: "the replica had just started",
}
"""Sources that give no joules, and their meaning."""
