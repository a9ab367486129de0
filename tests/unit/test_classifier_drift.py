import numpy as np
import pytest

from cluster.engines.classifier.serving import drift
from cluster.engines.classifier.serving.drift import DriftMonitor
from cluster.models.reference import Reference

LABELS = ("no", "yes")


def rows(count, share_yes, seed=0, confidence=0.9):
    random = np.random.default_rng(seed)
    yes = random.random(count) < share_yes
    top = np.clip(random.normal(confidence, 0.03, count), 0.5, 1.0)
    scores = np.where(yes[:, None], np.stack([1 - top, top], 1), np.stack([top, 1 - top], 1))
    return scores.astype(np.float32), random.integers(20, 200, count).tolist()


@pytest.fixture
def reference():
    return Reference.from_scores(*rows(5000, 0.3), LABELS)


def test_counts_equal_the_references_for_any_request_sizes(reference):
    monitor = DriftMonitor(LABELS, None)
    scores, lengths = rows(5000, 0.3)
    start = 0
    for size in [1] * 700 + [300, 3000, 1000]:
        monitor.observe(scores[start : start + size], lengths[start : start + size])
        start += size
    found = monitor.snapshot()
    assert found.num_texts == 5000
    assert found.labels == reference.labels
    assert found.confidence == tuple(reference.confidence)
    assert found.length == tuple(reference.length)
    assert found.drift is None


def test_similar_texts_do_not_drift(reference):
    monitor = DriftMonitor(LABELS, reference)
    monitor.observe(*rows(2000, 0.3, seed=1))
    found = monitor.snapshot().drift
    assert found is not None
    assert max(found.labels, found.confidence, found.length) < 0.05


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (rows(2000, 0.8, seed=1), {"labels"}),
        (rows(2000, 0.3, seed=1, confidence=0.7), {"confidence"}),
        ((rows(2000, 0.3, seed=1)[0], [2000] * 2000), {"length"}),
    ],
)
def test_each_kind_of_drift_is_detected(reference, changed, what):
    monitor = DriftMonitor(LABELS, reference)
    monitor.observe(*changed)
    found = monitor.snapshot().drift
    assert found is not None
    indices = {"labels": found.labels, "confidence": found.confidence, "length": found.length}
    assert {name for name, index in indices.items() if index > 0.25} == what


def test_small_windows_are_not_compared_and_old_texts_are_forgotten(reference):
    monitor = DriftMonitor(LABELS, reference)
    monitor.observe(*rows(drift.MIN_TEXTS - 1, 0.9))
    assert monitor.snapshot().drift is None
    for seed in range(20):
        monitor.observe(*rows(1000, 0.9, seed))
    assert monitor.snapshot().drift.labels > 1
    for seed in range(20):
        monitor.observe(*rows(250, 0.3, seed))
    found = monitor.snapshot()
    assert found.drift.labels < 0.05
    assert found.num_texts == 25_499
    assert drift.WINDOW_TEXTS <= found.window_texts < 2 * drift.WINDOW_TEXTS + drift.PENDING_TEXTS


def test_pending_texts_are_bounded():
    monitor = DriftMonitor(LABELS, None)
    for _ in range(1000):
        monitor.observe(*rows(3, 0.5))
        assert monitor.num_pending < drift.PENDING_TEXTS


def test_labels_missing_from_the_reference_count_as_new(reference):
    monitor = DriftMonitor(("maybe", "yes", "no"), reference)
    scores, lengths = rows(1000, 0.3)
    monitor.observe(np.concatenate([np.zeros((1000, 1), np.float32), scores[:, ::-1]], 1), lengths)
    assert monitor.snapshot().drift.labels < 0.02
    monitor.observe(np.eye(3, dtype=np.float32)[[0] * 1000], lengths)
    assert monitor.snapshot().drift.labels > 0.5
