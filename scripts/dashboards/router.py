"""Router dashboard: queues, routing decisions, links to replicas."""

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
    stat_panel,
    sum_of,
)


def router() -> Dashboard:
    board = make_dashboard(
        "router",
        "Tandem: router and links",
        "Queues, routing decisions, and the links to the replicas.",
        [make_variable("model", "tandem_in_flight_requests")],
    )
    panels = [
        section("Router"),
        graph(
            "Requests by route",
            "reqps",
            Query(rate_of("tandem_requests_total", "route"), "{{route}}"),
        ),
        graph("Queue time", "s", *quantiles("tandem_queue_seconds", 0.5, 0.95, 0.99)),
        graph(
            "Failovers, hand-overs and cut-off responses per second",
            "short",
            Query(rate_of("tandem_failovers_total", "model, reason"), "{{model}} {{reason}}"),
            Query(
                rate_of("tandem_stream_handovers_total", "model, reason, outcome"),
                "{{model}} hand-over {{reason}} {{outcome}}",
            ),
            Query(
                rate_of("tandem_idempotent_replays_total", "model, outcome"),
                "{{model}} replay {{outcome}}",
            ),
            Query(rate_of("tandem_cut_off_requests_total"), "{{model}} cut off"),
        ),
        graph(
            "Replicas without their share of requests",
            "short",
            Query(
                'max by (model, state) (tandem_circuits{model=~"$model", state!="closed"})',
                "{{model}} circuit {{state}}",
            ),
            Query(
                'max by (model) (tandem_draining_replicas{model=~"$model"})', "{{model}} draining"
            ),
        ),
        graph(
            "Circuits opened, and hedged requests, per second",
            "short",
            Query(rate_of("tandem_circuit_openings_total", "model, cause"), "{{model}} {{cause}}"),
            Query(
                rate_of("tandem_hedged_requests_total", "model, outcome"),
                "{{model}} hedge {{outcome}}",
            ),
        ),
        graph(
            "Tokens in flight, queued, and capacity",
            "short",
            Query(sum_of("tandem_in_flight_tokens"), "{{model}} in flight"),
            Query(sum_of("tandem_queued_tokens"), "{{model}} queued"),
            Query(sum_of("tandem_capacity_tokens"), "{{model}} capacity"),
        ),
        graph(
            "Drain rate in tokens per second",
            "short",
            Query(sum_of("tandem_drain_tokens_per_second")),
        ),
        graph(
            "Routing decisions per second by policy",
            "short",
            Query(
                rate_of("tandem_routing_decisions_total", "model, policy"), "{{model}} {{policy}}"
            ),
        ),
        graph(
            "Time per routing decision",
            "s",
            *quantiles("tandem_routing_decision_seconds", 0.5, 0.99),
        ),
        graph("Replicas by state", "short", Query(REPLICAS_BY_STATE, "{{model}} {{state}}")),
        section("Guards"),
        graph(
            "Prompts and answers checked per second, by outcome",
            "short",
            Query(
                rate_of("tandem_guard_checks_total", "model, guard, stage, outcome"),
                "{{model}} {{guard}} {{stage}} {{outcome}}",
            ),
        ),
        graph(
            "Duration of a check (p50, p99)",
            "s",
            *quantiles("tandem_guard_seconds", 0.5, 0.99),
        ),
        graph(
            "Fallbacks per second, by reason",
            "short",
            Query(
                rate_of("tandem_model_fallbacks_total", "model, fallback, reason"),
                "{{model}} to {{fallback}} {{reason}}",
            ),
        ),
        graph(
            "Choices of model: auto per second",
            "short",
            Query(rate_of("tandem_auto_choices_total", "model, rule"), "{{model}} rule {{rule}}"),
        ),
        section("Links"),
        graph(
            "Frames per second",
            "short",
            Query(
                rate_of("tandem_link_frames_total", "model, direction"), "{{model}} {{direction}}"
            ),
        ),
        graph(
            "Link traffic",
            "Bps",
            Query(
                rate_of("tandem_link_bytes_total", "model, direction"), "{{model}} {{direction}}"
            ),
        ),
        graph(
            "Connects and fallbacks per second",
            "short",
            Query(rate_of("tandem_link_connects_total"), "{{model}} connects"),
            Query(rate_of("tandem_link_fallbacks_total"), "{{model}} fallbacks"),
        ),
        stat_panel(
            "Certificate expires in",
            "s",
            Query("min(tandem_certificate_expiry_timestamp_seconds) - time()", "remaining"),
            width=8,
        ),
    ]
    return add_panels(board, panels)
