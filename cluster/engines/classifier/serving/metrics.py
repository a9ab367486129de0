"""What an encoder counted, written into the registry of its replica when that is read."""

from itertools import accumulate

from cluster.engines.classifier.serving.drift import DriftSnapshot
from cluster.engines.classifier.serving.service import ClassifierCounts
from cluster.metrics import Registry, table


def write_counts(registry: Registry, model: str, counts: ClassifierCounts) -> None:
    """Set the counters to what was counted since the start, and how exact the answers are."""
    sums = {
        table.CLASSIFIER_BATCHES: counts.batches,
        table.CLASSIFIER_TEXTS: counts.texts,
        table.CLASSIFIER_TOKENS: counts.tokens,
        table.CLASSIFIER_PADDING: counts.padding,
        table.CLASSIFIER_SECONDS: counts.compute_s,
        table.CLASSIFIER_TOKENIZE_SECONDS: counts.tokenize_s,
        table.CLASSIFIER_FAILED_BATCHES: counts.failed_batches,
        table.CLASSIFIER_SKIPPED: counts.skipped_texts,
        table.CLASSIFIER_CACHE_HITS: counts.cache_hits,
        table.CLASSIFIER_CACHE_MISSES: counts.cache_misses,
    }
    for metric, total in sums.items():
        registry.counter(metric, model).value = float(total)
    registry.histogram(table.CLASSIFIER_BATCH_TEXTS, model).set(counts.batch_texts)
    registry.gauge(table.CLASSIFIER_QUEUED_TOKENS, model).value = float(counts.queued_tokens)
    if counts.agreement is not None:
        registry.gauge(table.CLASSIFIER_AGREEMENT, model).value = counts.agreement


def write_drift(registry: Registry, model: str, seen: DriftSnapshot) -> None:
    """Set what the classified texts looked like, and how far that is from the reference."""
    for label, texts in seen.labels.items():
        registry.counter(table.CLASSIFIER_LABELS, model, label).value = float(texts)
    parts = len(seen.confidence)
    for part, texts in enumerate(accumulate(seen.confidence), 1):
        below = registry.counter(table.CLASSIFIER_CONFIDENCE, model, f"{part / parts:g}")
        below.value = float(texts)
    for power, texts in enumerate(accumulate(seen.length)):
        end = "+Inf" if power == len(seen.length) - 1 else str(2**power)
        registry.counter(table.CLASSIFIER_CHARACTERS, model, end).value = float(texts)
    if seen.drift is not None:
        for of, psi in (
            ("labels", seen.drift.labels),
            ("confidence", seen.drift.confidence),
            ("length", seen.drift.length),
        ):
            registry.gauge(table.CLASSIFIER_DRIFT, model, of).value = psi
