"""Metrics of a classifier in its replica's registry."""

from dataclasses import replace

from cluster.engines.classifier.serving.drift import Drift, DriftSnapshot
from cluster.engines.classifier.serving.metrics import ClassifierCounts, write_counts, write_drift
from cluster.metrics import Histogram, Registry


def values(registry: Registry) -> dict[tuple[str, ...], float]:
    return {
        (metric.name, *labels): child.total if isinstance(child, Histogram) else child.value
        for metric, labels, child in registry.collect()
    }


def test_counters_follow_the_counts() -> None:
    registry = Registry()
    counts = ClassifierCounts(
        skipped_texts=1, agreement=None, tokenize_s=0.5, queued_tokens=7, cache_hits=3
    )
    counts.failed_batches = 2
    for texts in (5, 4):
        counts.add_batch(texts, 35, padding=2, compute_s=0.125)
        write_counts(registry, "m", counts)
    found = values(registry)
    assert found["tandem_classifier_texts_total", "m"] == 9
    assert found["tandem_classifier_compute_seconds_total", "m"] == 0.25
    assert found["tandem_classifier_padding_total", "m"] == 4
    assert found["tandem_classifier_cache_hits_total", "m"] == 3
    assert found["tandem_classifier_batch_texts", "m"] == 9
    assert found["tandem_classifier_tokenize_seconds_total", "m"] == 0.5
    assert found["tandem_classifier_queued_tokens", "m"] == 7
    assert found["tandem_classifier_failed_batches_total", "m"] == 2
    assert ("tandem_classifier_agreement_ratio", "m") not in found
    write_counts(registry, "m", replace(counts, agreement=0.9975))
    assert values(registry)["tandem_classifier_agreement_ratio", "m"] == 0.9975


def test_histograms_are_cumulative_and_drift_is_optional() -> None:
    registry = Registry()
    labels = {"NEGATIVE": 1, "POSITIVE": 3}
    seen = DriftSnapshot(4, labels, (0, 1, 0, 3), (0, 1, 2, 1), 4, None)
    write_drift(registry, "m", seen)
    found = values(registry)
    assert found["tandem_classifier_labels_total", "m", "POSITIVE"] == 3
    confidence = [
        found["tandem_classifier_confidence_total", "m", le] for le in ("0.25", "0.5", "1")
    ]
    assert confidence == [0, 1, 4]
    assert found["tandem_classifier_characters_total", "m", "4"] == 3
    assert found["tandem_classifier_characters_total", "m", "+Inf"] == 4
    assert ("tandem_classifier_drift_ratio", "m", "labels") not in found
    write_drift(registry, "m", DriftSnapshot(4, labels, (4,), (4,), 4, Drift(0.1, 0.2, 0.3)))
    assert values(registry)["tandem_classifier_drift_ratio", "m", "length"] == 0.3
