"""What an encoder counted, written into the registry of its replica when that is read."""

from itertools import accumulate

from cluster.engines.encoder.drift import DriftSnapshot
from cluster.engines.encoder.service import EncoderCounts
from cluster.metrics import Registry, table


def write_counts(registry: Registry, model: str, counts: EncoderCounts) -> None:
    """Set the counters to what was counted since the start, and how exact the answers are."""
    sums = {
        table.ENCODER_BATCHES: counts.batches,
        table.ENCODER_TEXTS: counts.texts,
        table.ENCODER_TOKENS: counts.tokens,
        table.ENCODER_PADDING: counts.padding,
        table.ENCODER_SECONDS: counts.compute_s,
        table.ENCODER_TOKENIZE_SECONDS: counts.tokenize_s,
        table.ENCODER_FAILED_BATCHES: counts.failed_batches,
        table.ENCODER_SKIPPED: counts.skipped_texts,
        table.ENCODER_CACHE_HITS: counts.cache_hits,
        table.ENCODER_CACHE_MISSES: counts.cache_misses,
    }
    for metric, total in sums.items():
        registry.counter(metric, model).value = float(total)
    registry.histogram(table.ENCODER_BATCH_TEXTS, model).set(counts.batch_texts)
    registry.gauge(table.ENCODER_QUEUED_TOKENS, model).value = float(counts.queued_tokens)
    if counts.agreement is not None:
        registry.gauge(table.ENCODER_AGREEMENT, model).value = counts.agreement


def write_drift(registry: Registry, model: str, seen: DriftSnapshot) -> None:
    """Set what the classified texts looked like, and how far that is from the reference."""
    for label, texts in seen.labels.items():
        registry.counter(table.ENCODER_LABELS, model, label).value = float(texts)
    parts = len(seen.confidence)
    for part, texts in enumerate(accumulate(seen.confidence), 1):
        below = registry.counter(table.ENCODER_CONFIDENCE, model, f"{part / parts:g}")
        below.value = float(texts)
    for power, texts in enumerate(accumulate(seen.length)):
        end = "+Inf" if power == len(seen.length) - 1 else str(2**power)
        registry.counter(table.ENCODER_CHARACTERS, model, end).value = float(texts)
    if seen.drift is not None:
        for of, psi in (
            ("labels", seen.drift.labels),
            ("confidence", seen.drift.confidence),
            ("length", seen.drift.length),
        ):
            registry.gauge(table.ENCODER_DRIFT, model, of).value = psi
