"""Cost dashboard: energy, money, devices."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    Query,
    add_panels,
    graph,
    make_dashboard,
    make_variable,
    rate_of,
    section,
    selected,
)


def cost() -> Dashboard:
    board = make_dashboard(
        "cost",
        "Tandem: cost and energy",
        "Energy, cost and devices. Panels without a hardware counter stay empty.",
        [make_variable("model", "tandem_in_flight_requests")],
    )
    energy, tokens = (
        rate_of("tandem_energy_joules_total"),
        rate_of("tandem_completion_tokens_total"),
    )
    panels = [
        section("Energy and cost"),
        graph(
            "Power by model",
            "watt",
            Query(rate_of("tandem_energy_joules_total", "model, source"), "{{model}} ({{source}})"),
        ),
        graph(
            "Power by tenant",
            "watt",
            Query(
                rate_of("tandem_energy_joules_total", "tenant, source"), "{{tenant}} ({{source}})"
            ),
        ),
        graph("Energy per completion token", "joule", Query(f"{energy} / ({tokens} > 0)")),
        graph("Cost per hour by model", "short", Query(f"3600 * {rate_of('tandem_cost_total')}")),
        graph(
            "Cost per hour by tenant",
            "short",
            Query(f"3600 * {rate_of('tandem_cost_total', 'tenant')}", "{{tenant}}"),
        ),
        graph(
            "Cost per million completion tokens",
            "short",
            Query(f"1e6 * {rate_of('tandem_cost_total')} / ({tokens} > 0)"),
        ),
        section("Devices"),
        graph(
            "Power of devices", "watt", Query(selected("tandem_device_power_watts"), "{{device}}")
        ),
        graph(
            "Temperature of devices",
            "celsius",
            Query(selected("tandem_device_temperature_celsius"), "{{device}}"),
        ),
        graph(
            "Memory of devices",
            "bytes",
            Query(selected("tandem_device_memory_used_bytes"), "{{device}}"),
        ),
        graph(
            "Throttled devices", "short", Query(selected("tandem_device_throttled"), "{{device}}")
        ),
        graph(
            "Device errors",
            "short",
            Query(selected("tandem_device_xid_errors_total"), "{{device}} XID {{xid}}"),
            Query(selected("tandem_device_ecc_errors_total"), "{{device}} ECC"),
        ),
        graph(
            "Memory growth of processes",
            "Bps",
            Query("tandem_memory_growth_bytes_per_second", "{{deployment}} {{process}}"),
        ),
    ]
    return add_panels(board, panels)
