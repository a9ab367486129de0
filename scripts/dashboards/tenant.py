"""Tenant dashboard: traffic, tokens, limits and cost."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import Query, add_panels, make_dashboard, make_variable, rate_of, time_series


def tenant() -> Dashboard:
    """Return the dashboard."""
    board = make_dashboard(
        "tenant",
        "Tandem: tenant",
        "Traffic, tokens, limits and cost of one tenant.",
        [make_variable("tenant", "tandem_tenant_requests_total")],
    )
    selected = 'tenant=~"$tenant"'
    panels = [
        time_series(
            "Requests by status",
            "reqps",
            Query(
                rate_of("tandem_tenant_requests_total", "tenant, status", selected),
                "{{tenant}} {{status}}",
            ),
        ),
        time_series(
            "Tokens per second",
            "short",
            Query(
                rate_of("tandem_tenant_tokens_total", "tenant, model, kind", selected),
                "{{tenant}} {{model}} {{kind}}",
            ),
        ),
        time_series(
            "Rejected at a limit",
            "reqps",
            Query(
                rate_of("tandem_limits_hit_total", "tenant, limit", selected),
                "{{tenant}} {{limit}}",
            ),
        ),
        time_series(
            "Power",
            "watt",
            Query(
                rate_of("tandem_energy_joules_total", "tenant, source", selected),
                "{{tenant}} ({{source}})",
            ),
        ),
        time_series(
            "Cost per hour",
            "short",
            Query(f"3600 * {rate_of('tandem_cost_total', 'tenant', selected)}", "{{tenant}}"),
        ),
    ]
    return add_panels(board, panels)
