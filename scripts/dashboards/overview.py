"""Is it well: objectives, traffic, errors, capacity."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    REPLICAS,
    Query,
    chosen,
    filled,
    lines,
    number,
    page,
    quantiles,
    rate,
    row,
    total,
    variable,
)


def overview() -> Dashboard:
    """The page."""
    board = page(
        "overview",
        "Tandem: overview",
        "Objectives, traffic, errors and capacity of the whole deployment.",
        [variable("model", "tandem_in_flight_requests")],
    )
    served = rate("tandem_requests_total", where='model=~"$model",status!="499"')
    # As the rules count it: answers that break off are in it, whose status is 200.
    failed = (
        "sum by (model) ("
        'rate(tandem_requests_total{model=~"$model",status=~"5.."}[$__rate_interval])'
        ' or rate(tandem_cut_off_requests_total{model=~"$model"}[$__rate_interval]))'
    )
    panels = [
        number("Requests per second", "reqps", Query(f"sum({served})", "")),
        number(
            "Failed, last hour",
            "percentunit",
            Query("max(model:tandem_errors:ratio_rate1h) or vector(0)"),
        ),
        number("Ongoing", "short", Query("sum(tandem_in_flight_requests)", "")),
        number("Queued", "short", Query("sum(tandem_queued_requests)", "")),
        number("Reachable replicas", "short", Query("model:tandem_reachable_replicas:max")),
        number("Alerts", "short", Query('count(ALERTS{alertstate="firing"}) or vector(0)', "")),
        row("Traffic"),
        lines("Requests by model", "reqps", Query(served)),
        lines(
            "Answers by status",
            "reqps",
            Query(rate("tandem_requests_total", "status"), "{{status}}"),
        ),
        lines(
            "Tokens",
            "short",
            Query(rate("tandem_prompt_tokens_total"), "{{model}} prompt"),
            Query(rate("tandem_completion_tokens_total"), "{{model}} completion"),
        ),
        row("Objectives"),
        lines("Error ratio", "percentunit", Query(f"{failed} / ({served} > 0) or {served} * 0")),
        lines("First bytes", "s", *quantiles("tandem_ttft_seconds", 0.5, 0.95)),
        lines("Whole requests", "s", *quantiles("tandem_request_seconds", 0.5, 0.95)),
        lines(
            "Latency by its objective",
            "short",
            Query('model:tandem_objective:ratio_rate5m{model=~"$model"}', "{{model}} {{of}}"),
        ),
        row("Capacity"),
        lines(
            "Ongoing and queued",
            "short",
            Query(total("tandem_in_flight_requests"), "{{model}} ongoing"),
            Query(total("tandem_queued_requests"), "{{model}} queued"),
        ),
        lines("Refused", "reqps", Query(rate("tandem_shed_requests_total"))),
        lines(
            "Replicas",
            "short",
            Query(REPLICAS, "{{model}} {{state}}"),
        ),
        lines(
            "Replicas wanted", "short", Query("max by (model) (tandem_autoscaling_target_replicas)")
        ),
        lines(
            "Scaling decisions",
            "short",
            Query(
                rate("tandem_autoscaling_decisions_total", "model, reason"), "{{model}} {{reason}}"
            ),
        ),
        lines(
            "Nodes",
            "percent",
            Query("ray_node_cpu_utilization", "{{instance}} CPU"),
            Query("100 * ray_node_mem_used / ray_node_mem_total", "{{instance}} memory"),
        ),
        row("Processes"),
        lines(
            "Memory of replicas and routers",
            "bytes",
            Query("tandem_process_resident_memory_bytes", "{{deployment}} {{process}} {{replica}}"),
            width=12,
        ),
        lines(
            "Memory of Ray",
            "bytes",
            Query("sum by (Component) (ray_component_rss_bytes)", "{{Component}}"),
            width=12,
        ),
        lines(
            "Start of replicas",
            "s",
            Query(
                f"max by (model, phase) ({chosen('tandem_startup_seconds')})",
                "{{model}} {{phase}}",
            ),
            width=12,
        ),
    ]
    return filled(board, panels)
