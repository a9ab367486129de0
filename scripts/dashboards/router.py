"""The routers, and the links to the replicas."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    REPLICAS,
    Query,
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


def router() -> Dashboard:
    """The page."""
    board = page(
        "router",
        "Tandem: router and links",
        "Queues, choices among replicas, and the links to them.",
        [variable("model", "tandem_in_flight_requests")],
    )
    panels = [
        row("Router"),
        lines(
            "Requests by route", "reqps", Query(rate("tandem_requests_total", "route"), "{{route}}")
        ),
        lines("Time in the queue", "s", *quantiles("tandem_queue_seconds", 0.5, 0.95, 0.99)),
        lines(
            "Handed over, cut off",
            "short",
            Query(rate("tandem_failovers_total", "model, reason"), "{{model}} {{reason}}"),
            Query(rate("tandem_cut_off_requests_total"), "{{model}} cut off"),
        ),
        lines(
            "Tokens of requests, and capacity",
            "short",
            Query(total("tandem_in_flight_tokens"), "{{model}} ongoing"),
            Query(total("tandem_queued_tokens"), "{{model}} queued"),
            Query(total("tandem_capacity_tokens"), "{{model}} capacity"),
        ),
        lines(
            "Tokens that leave the replicas",
            "short",
            Query(total("tandem_drain_tokens_per_second")),
        ),
        lines(
            "Choices by what decided",
            "short",
            Query(rate("tandem_routing_decisions_total", "model, policy"), "{{model}} {{policy}}"),
        ),
        lines("Time of a choice", "s", *quantiles("tandem_routing_decision_seconds", 0.5, 0.99)),
        lines(
            "Replicas by state",
            "short",
            Query(REPLICAS, "{{model}} {{state}}"),
        ),
        row("Links"),
        lines(
            "Frames",
            "short",
            Query(rate("tandem_link_frames_total", "model, direction"), "{{model}} {{direction}}"),
        ),
        lines(
            "Bytes",
            "Bps",
            Query(rate("tandem_link_bytes_total", "model, direction"), "{{model}} {{direction}}"),
        ),
        lines(
            "Connects and fallbacks",
            "short",
            Query(rate("tandem_link_connects_total"), "{{model}} connects"),
            Query(rate("tandem_link_fallbacks_total"), "{{model}} fallbacks"),
        ),
        number(
            "Certificate",
            "s",
            Query("min(tandem_certificate_expiry_timestamp_seconds) - time()", "left"),
            width=8,
        ),
    ]
    return filled(board, panels)
