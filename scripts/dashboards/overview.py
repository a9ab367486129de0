"""Overview dashboard: SLOs, traffic, errors, capacity."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    REPLICAS_BY_STATE,
    Query,
    add_panels,
    graph,
    make_dashboard,
    make_variable,
    quantiles,
    rate_of,
    section,
    selected,
    stat_panel,
    sum_of,
)


def overview() -> Dashboard:
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
        graph("Requests by model", "reqps", Query(served)),
        graph(
            "Responses by status",
            "reqps",
            Query(rate_of("tandem_requests_total", "status"), "{{status}}"),
        ),
        graph(
            "Tokens per second",
            "short",
            Query(rate_of("tandem_prompt_tokens_total"), "{{model}} prompt"),
            Query(rate_of("tandem_completion_tokens_total"), "{{model}} completion"),
        ),
        section("SLOs"),
        graph("Error ratio", "percentunit", Query(f"{failed} / ({served} > 0) or {served} * 0")),
        graph("Time to first byte (TTFT)", "s", *quantiles("tandem_ttft_seconds", 0.5, 0.95)),
        graph("Request duration", "s", *quantiles("tandem_request_seconds", 0.5, 0.95)),
        graph(
            "Latency relative to SLO",
            "short",
            Query('model:tandem_objective:ratio_rate5m{model=~"$model"}', "{{model}} {{of}}"),
        ),
        section("Capacity"),
        graph(
            "Requests in flight and queued",
            "short",
            Query(sum_of("tandem_in_flight_requests"), "{{model}} in flight"),
            Query(sum_of("tandem_queued_requests"), "{{model}} queued"),
        ),
        graph("Shed requests", "reqps", Query(rate_of("tandem_shed_requests_total"))),
        graph("Replicas", "short", Query(REPLICAS_BY_STATE, "{{model}} {{state}}")),
        graph(
            "Rollouts: share of the new version, and requests answered by the old one instead",
            "short",
            Query("max by (model) (tandem_rollout_share_ratio)", "{{model}} share"),
            Query(rate_of("tandem_rollout_retries_total"), "{{model}} retries per second"),
        ),
        graph(
            "Target replicas", "short", Query("max by (model) (tandem_autoscaling_target_replicas)")
        ),
        graph(
            "Scaling decisions",
            "short",
            Query(
                rate_of("tandem_autoscaling_decisions_total", "model, reason"),
                "{{model}} {{reason}}",
            ),
        ),
        graph(
            "CPU and memory of nodes",
            "percent",
            Query("ray_node_cpu_utilization", "{{instance}} CPU"),
            Query("100 * ray_node_mem_used / ray_node_mem_total", "{{instance}} memory"),
        ),
        section("Processes"),
        graph(
            "Memory of replicas and routers",
            "bytes",
            Query("tandem_process_resident_memory_bytes", "{{deployment}} {{process}} {{replica}}"),
            width=12,
        ),
        graph(
            "Memory of Ray",
            "bytes",
            Query("sum by (Component) (ray_component_rss_bytes)", "{{Component}}"),
            width=12,
        ),
        graph(
            "Startup time of replicas by phase",
            "s",
            Query(
                f"max by (model, phase) ({selected('tandem_startup_seconds')})",
                "{{model}} {{phase}}",
            ),
            width=12,
        ),
    ]
    return add_panels(board, panels)
