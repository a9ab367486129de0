"""What it takes: energy, money, devices."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import Query, chosen, filled, lines, page, rate, row, variable


def cost() -> Dashboard:
    """The page."""
    board = page(
        "cost",
        "Tandem: cost and energy",
        "Energy, cost and devices. What no counter measures is absent.",
        [variable("model", "tandem_in_flight_requests")],
    )
    energy, tokens = rate("tandem_energy_joules_total"), rate("tandem_completion_tokens_total")
    panels = [
        row("Energy and cost"),
        lines(
            "Power by model",
            "watt",
            Query(rate("tandem_energy_joules_total", "model, source"), "{{model}} ({{source}})"),
        ),
        lines(
            "Power by tenant",
            "watt",
            Query(rate("tandem_energy_joules_total", "tenant, source"), "{{tenant}} ({{source}})"),
        ),
        lines("Energy of a completion token", "joule", Query(f"{energy} / ({tokens} > 0)")),
        lines("Cost an hour by model", "short", Query(f"3600 * {rate('tandem_cost_total')}")),
        lines(
            "Cost an hour by tenant",
            "short",
            Query(f"3600 * {rate('tandem_cost_total', 'tenant')}", "{{tenant}}"),
        ),
        lines(
            "Cost of a million completion tokens",
            "short",
            Query(f"1e6 * {rate('tandem_cost_total')} / ({tokens} > 0)"),
        ),
        row("Devices"),
        lines("Power", "watt", Query(chosen("tandem_device_power_watts"), "{{device}}")),
        lines(
            "Temperature",
            "celsius",
            Query(chosen("tandem_device_temperature_celsius"), "{{device}}"),
        ),
        lines("Memory", "bytes", Query(chosen("tandem_device_memory_used_bytes"), "{{device}}")),
        lines("Slowed down", "short", Query(chosen("tandem_device_throttled"), "{{device}}")),
        lines(
            "Errors",
            "short",
            Query(chosen("tandem_device_xid_errors_total"), "{{device}} XID {{xid}}"),
            Query(chosen("tandem_device_ecc_errors_total"), "{{device}} ECC"),
        ),
        lines(
            "Memory growth",
            "Bps",
            Query("tandem_memory_growth_bytes_per_second", "{{deployment}} {{process}}"),
        ),
    ]
    return filled(board, panels)
