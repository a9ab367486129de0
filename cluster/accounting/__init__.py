"""What requests cost, in joules and in money.

costs     what a prefill and a decode token cost, learned from what was measured; pure
ledger    the division of what was measured among a replica's requests; pure
counters  the energy counters and CPU clocks of this machine
meter     what a replica used since the last reading, from the best counters there are
usage     hourly sums by tenant and model; ``usage_log`` keeps them in a file

A figure that no counter gives is missing, with the reason; an estimate is named an estimate.
"""

ANONYMOUS = "_anonymous"
"""Stands for the tenant of requests that had none."""
IDLE = "_idle"
"""Stands for the tenant of what was used while no request was computed."""
OTHER = "other"
"""Stands for tenants beyond the number that is told apart."""

ESTIMATE = "estimate"
"""Source of joules that are a CPU time times a configured power, not measured."""
LEARNING = "learning"
"""Source of a request that ended before the first figures of its replica were divided."""
REASONS = {
    "": "the replica does not account for energy (accounting.energy is false)",
    "no-counter": "the machine has neither a GPU's energy counter nor RAPL, and "
    "accounting.watts_per_core is not set",
    "rapl-unreadable": "RAPL's counters (/sys/class/powercap) may be read by root alone",
    "nvml-unsupported": "the GPU has no energy counter (they came with Volta)",
    LEARNING: "the replica had just started",
}
"""Sources that stand for no figure, and what each means."""
