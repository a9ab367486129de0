"""Classifier dashboard: batches, padding, compute time, results."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    Query,
    add_panels,
    graph,
    make_dashboard,
    make_variable,
    quantiles,
    rate_of,
    section,
    selected,
    sum_of,
)


def classifier() -> Dashboard:
    board = make_dashboard(
        "classifier",
        "Tandem: classifier",
        "Batches, padding, compute time and results of classifiers.",
        [make_variable("model", "tandem_classifier_texts_total")],
    )
    padding = rate_of("tandem_classifier_padding_total")
    computed = f"({rate_of('tandem_classifier_tokens_total')} + {padding} > 0)"
    hits, misses = (
        rate_of("tandem_classifier_cache_hits_total"),
        rate_of("tandem_classifier_cache_misses_total"),
    )
    panels = [
        section("Throughput"),
        graph("Texts per second", "short", Query(rate_of("tandem_classifier_texts_total"))),
        graph("Tokens per second", "short", Query(rate_of("tandem_classifier_tokens_total"))),
        graph("Request duration", "s", *quantiles("tandem_request_seconds", 0.5, 0.95, 0.99)),
        section("Batching"),
        graph(
            "Batches per second",
            "short",
            Query(rate_of("tandem_classifier_batches_total")),
            Query(rate_of("tandem_classifier_failed_batches_total"), "{{model}} failed"),
        ),
        graph("Texts per batch", "short", *quantiles("tandem_classifier_batch_texts", 0.5, 0.95)),
        graph("Padding share", "percentunit", Query(f"{padding} / {computed}")),
        graph("Queued tokens", "short", Query(sum_of("tandem_classifier_queued_tokens"))),
        graph(
            "Busy time per second",
            "s",
            Query(rate_of("tandem_classifier_compute_seconds_total"), "{{model}} computing"),
            Query(rate_of("tandem_classifier_tokenize_seconds_total"), "{{model}} tokenizing"),
        ),
        graph(
            "Skipped texts per second",
            "short",
            Query(rate_of("tandem_classifier_skipped_texts_total")),
        ),
        section("Results"),
        graph(
            "Labels per second",
            "short",
            Query(rate_of("tandem_classifier_labels_total", "model, label"), "{{model}} {{label}}"),
        ),
        graph(
            "Texts by top score, cumulative",
            "percentunit",
            _share_below("tandem_classifier_confidence_total", "1"),
        ),
        graph(
            "Texts by length in characters, cumulative",
            "percentunit",
            _share_below("tandem_classifier_characters_total", "+Inf"),
        ),
        graph(
            "Drift (population stability index)",
            "short",
            Query(
                f"max by (model, of) ({selected('tandem_classifier_drift_ratio')})",
                "{{model}} {{of}}",
            ),
        ),
        graph(
            "Agreement with float32",
            "percentunit",
            Query(f"min by (model) ({selected('tandem_classifier_agreement_ratio')})"),
        ),
        graph("Result cache hit rate", "percentunit", Query(f"{hits} / ({hits} + {misses} > 0)")),
    ]
    return add_panels(board, panels)


def _share_below(metric: str, largest: str) -> Query:
    """Return each bucket over the bucket with the largest bound."""
    everything = rate_of(metric, where=f'model=~"$model",le="{largest}"')
    share = f"{rate_of(metric, 'model, le')} / on (model) group_left () ({everything} > 0)"
    return Query(share, "{{model}} ≤ {{le}}")
