"""One tenant: its traffic, tokens, limits and cost."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import Query, filled, lines, page, rate, variable


def tenant() -> Dashboard:
    """The page."""
    board = page(
        "tenant",
        "Tandem: tenant",
        "What one tenant sends, gets and costs.",
        [variable("tenant", "tandem_tenant_requests_total")],
    )
    mine = 'tenant=~"$tenant"'
    panels = [
        lines(
            "Requests by status",
            "reqps",
            Query(
                rate("tandem_tenant_requests_total", "tenant, status", mine),
                "{{tenant}} {{status}}",
            ),
        ),
        lines(
            "Tokens",
            "short",
            Query(
                rate("tandem_tenant_tokens_total", "tenant, model, kind", mine),
                "{{tenant}} {{model}} {{kind}}",
            ),
        ),
        lines(
            "Refused at a limit",
            "reqps",
            Query(rate("tandem_limits_hit_total", "tenant, limit", mine), "{{tenant}} {{limit}}"),
        ),
        lines(
            "Power",
            "watt",
            Query(
                rate("tandem_energy_joules_total", "tenant, source", mine),
                "{{tenant}} ({{source}})",
            ),
        ),
        lines(
            "Cost an hour",
            "short",
            Query(f"3600 * {rate('tandem_cost_total', 'tenant', mine)}", "{{tenant}}"),
        ),
    ]
    return filled(board, panels)
