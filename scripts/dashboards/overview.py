"""Overview dashboard: SLOs, traffic, errors, capacity."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    REPLICAS_BY_STATE,
    Query,
    add_panels,
    make_dashboard,
    make_variable,
    quantile_queries,
    rate_of,
    section,
    select_model,
    stat_panel,
    sum_of,
    time_series,
)


def overview() -> Dashboard:
    """Return the dashboard."""
    board = make_dashboard(
        "overview",
        "Tandem: overview",
        "SLOs, traffic, errors and capacity of the whole deployment.",
        [make_variable("model", "tandem_in_flight_requests")],
    )
    served = rate_of("tandem_requests_total", where='model=~"$model",status!="499"')
    # As in the alert rules: cut-off streams count as errors although their status is 200.
    failed = (
        "sum by (model) ("
        'rate(tandem_requests_total{model=~"$model",status=~"5.."}[$__rate_interval])'
        ' or rate(tandem_cut_off_requests_total{model=~"$model"}[$__rate_interval]))'
    )
    panels = [
        stat_panel("Requests per second", "reqps", Query(f"sum({served})", "")),
        stat_panel(
            "Error ratio, last hour",
            "percentunit",
            Query("max(model:tandem_errors:ratio_rate1h) or vector(0)"),
        ),
        stat_panel("In flight", "short", Query("sum(tandem_in_flight_requests)", "")),
        stat_panel("Queued", "short", Query("sum(tandem_queued_requests)", "")),
        stat_panel("Reachable replicas", "short", Query("model:tandem_reachable_replicas:max")),
        stat_panel(
            "Firing alerts", "short", Query('count(ALERTS{alertstate="firing"}) or vector(0)', "")
        ),
        section("Traffic"),
        time_series("Requests by model", "reqps", Query(served)),
        time_series(
            "Responses by status",
            "reqps",
            Query(rate_of("tandem_requests_total", "status"), "{{status}}"),
        ),
        time_series(
            "Tokens per second",
            "short",
            Query(rate_of("tandem_prompt_tokens_total"), "{{model}} prompt"),
            Query(rate_of("tandem_completion_tokens_total"), "{{model}} completion"),
        ),
        section("SLOs"),
        time_series(
            "Error ratio", "percentunit", Query(f"{failed} / ({served} > 0) or {served} * 0")
        ),
        time_series(
            "Time to first byte (TTFT)", "s", *quantile_queries("tandem_ttft_seconds", 0.5, 0.95)
        ),
        time_series(
            "Request duration", "s", *quantile_queries("tandem_request_seconds", 0.5, 0.95)
        ),
        time_series(
            "Latency relative to SLO",
            "short",
            Query('model:tandem_objective:ratio_rate5m{model=~"$model"}', "{{model}} {{of}}"),
        ),
        section("Capacity"),
        time_series(
            "Requests in flight and queued",
            "short",
            Query(sum_of("tandem_in_flight_requests"), "{{model}} in flight"),
            Query(sum_of("tandem_queued_requests"), "{{model}} queued"),
        ),
        time_series("Shed requests", "reqps", Query(rate_of("tandem_shed_requests_total"))),
        time_series(
            "Replicas",
            "short",
            Query(REPLICAS_BY_STATE, "{{model}} {{state}}"),
        ),
        time_series(
            "Target replicas", "short", Query("max by (model) (tandem_autoscaling_target_replicas)")
        ),
        time_series(
            "Scaling decisions",
            "short",
            Query(
                rate_of("tandem_autoscaling_decisions_total", "model, reason"),
                "{{model}} {{reason}}",
            ),
        ),
        time_series(
            "CPU and memory of nodes",
            "percent",
            Query("ray_node_cpu_utilization", "{{instance}} CPU"),
            Query("100 * ray_node_mem_used / ray_node_mem_total", "{{instance}} memory"),
        ),
        section("Processes"),
        time_series(
            "Memory of replicas and routers",
            "bytes",
            Query("tandem_process_resident_memory_bytes", "{{deployment}} {{process}} {{replica}}"),
            width=12,
        ),
        time_series(
            "Memory of Ray",
            "bytes",
            Query("sum by (Component) (ray_component_rss_bytes)", "{{Component}}"),
            width=12,
        ),
        time_series(
            "Startup time of replicas by phase",
            "s",
            Query(
                f"max by (model, phase) ({select_model('tandem_startup_seconds')})",
                "{{model}} {{phase}}",
            ),
            width=12,
        ),
    ]
    return add_panels(board, panels)
