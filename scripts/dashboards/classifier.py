"""Encoders: batches, padding, where their time goes, what they say."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import (
    Query,
    chosen,
    filled,
    lines,
    page,
    quantiles,
    rate,
    row,
    total,
    variable,
)


def classifier() -> Dashboard:
    """The page."""
    board = page(
        "classifier",
        "Tandem: classifier",
        "Batches, padding, time and answers of encoders.",
        [variable("model", "tandem_classifier_texts_total")],
    )
    padding = rate("tandem_classifier_padding_total")
    cells = f"({rate('tandem_classifier_tokens_total')} + {padding} > 0)"
    hits, misses = (
        rate("tandem_classifier_cache_hits_total"),
        rate("tandem_classifier_cache_misses_total"),
    )
    panels = [
        row("Work"),
        lines("Texts", "short", Query(rate("tandem_classifier_texts_total"))),
        lines("Tokens", "short", Query(rate("tandem_classifier_tokens_total"))),
        lines("Requests", "s", *quantiles("tandem_request_seconds", 0.5, 0.95, 0.99)),
        row("Batches"),
        lines(
            "Batches",
            "short",
            Query(rate("tandem_classifier_batches_total")),
            Query(rate("tandem_classifier_failed_batches_total"), "{{model}} failed"),
        ),
        lines("Texts in a batch", "short", *quantiles("tandem_classifier_batch_texts", 0.5, 0.95)),
        lines("Padding", "percentunit", Query(f"{padding} / {cells}")),
        lines("Tokens that wait", "short", Query(total("tandem_classifier_queued_tokens"))),
        lines(
            "Time per second",
            "s",
            Query(rate("tandem_classifier_compute_seconds_total"), "{{model}} computing"),
            Query(rate("tandem_classifier_tokenize_seconds_total"), "{{model}} tokenizing"),
        ),
        lines("Texts skipped", "short", Query(rate("tandem_classifier_skipped_texts_total"))),
        row("Answers"),
        lines(
            "Labels",
            "short",
            Query(rate("tandem_classifier_labels_total", "model, label"), "{{model}} {{label}}"),
        ),
        lines("Scores below", "percentunit", _share("tandem_classifier_confidence_total", "1")),
        lines(
            "Texts shorter than",
            "percentunit",
            _share("tandem_classifier_characters_total", "+Inf"),
        ),
        lines(
            "Drift",
            "short",
            Query(
                f"max by (model, of) ({chosen('tandem_classifier_drift_ratio')})",
                "{{model}} {{of}}",
            ),
        ),
        lines(
            "Agreement with float32",
            "percentunit",
            Query(f"min by (model) ({chosen('tandem_classifier_agreement_ratio')})"),
        ),
        lines(
            "Results found in the cache", "percentunit", Query(f"{hits} / ({hits} + {misses} > 0)")
        ),
    ]
    return filled(board, panels)


def _share(metric: str, most: str) -> Query:
    """Of what is below each bound, by what is below the largest one."""
    everything = rate(metric, where=f'model=~"$model",le="{most}"')
    share = f"{rate(metric, 'model, le')} / on (model) group_left () ({everything} > 0)"
    return Query(share, "{{model}} {{le}}")
