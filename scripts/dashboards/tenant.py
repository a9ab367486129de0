"""Tenant dashboard: traffic, tokens, limits and cost."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import Query, add_panels, graph, make_dashboard, make_variable, rate_of


def tenant() -> Dashboard:
    board = make_dashboard(
        "tenant",
        "Tandem: tenant",
        "Traffic, tokens, limits and cost of one tenant.",
        [make_variable("tenant", "tandem_tenant_requests_total")],
    )
    chosen = 'tenant=~"$tenant"'
    panels = [
        graph(
            "Requests by status",
            "reqps",
            Query(
                rate_of("tandem_tenant_requests_total", "tenant, status", chosen),
                "{{tenant}} {{status}}",
            ),
        ),
        graph(
            "Tokens per second",
            "short",
            Query(
                rate_of("tandem_tenant_tokens_total", "tenant, model, kind", chosen),
                "{{tenant}} {{model}} {{kind}}",
            ),
        ),
        graph(
            "Rejected at a limit",
            "reqps",
            Query(
                rate_of("tandem_limits_hit_total", "tenant, limit", chosen), "{{tenant}} {{limit}}"
            ),
        ),
        graph(
            "Power",
            "watt",
            Query(
                rate_of("tandem_energy_joules_total", "tenant, source", chosen),
                "{{tenant}} ({{source}})",
            ),
        ),
        graph(
            "Cost per hour",
            "short",
            Query(f"3600 * {rate_of('tandem_cost_total', 'tenant', chosen)}", "{{tenant}}"),
        ),
        graph(
            "Budget spent",
            "percentunit",
            Query(
                f"max by (tenant, key, period) (tandem_budget_spent_ratio{{{chosen}}})",
                "{{tenant}} {{key}} {{period}}",
            ),
        ),
    ]
    return add_panels(board, panels)
