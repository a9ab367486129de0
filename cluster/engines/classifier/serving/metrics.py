"""Counters of a classifier, and their export to the replica's registry on scrape."""

from dataclasses import asdict, dataclass, field
from itertools import accumulate

from cluster.engines.classifier.serving.drift import DriftSnapshot
from cluster.metrics import Histogram, Registry, table


@dataclass(slots=True)
class BatchCounts:
    """Batches computed since the start; each model thread writes its own."""

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    padding: float = 0.0
    """Computed padding, in token equivalents."""
    compute_s: float = 0.0
    """Summed over threads, so two threads can add two seconds per second."""
    failed_batches: int = 0
    """Batches that raised; not included in ``batches``."""
    batch_texts: Histogram = field(
        default_factory=lambda: Histogram(table.CLASSIFIER_BATCH_TEXTS.buckets)
    )

    def add_batch(self, texts: int, tokens: int, padding: float, compute_s: float) -> None:
        self.batches += 1
        self.texts += texts
        self.tokens += tokens
        self.padding += padding
        self.compute_s += compute_s
        self.batch_texts.observe(texts)

    def add_counts(self, other: "BatchCounts") -> None:
        self.batch_texts.add(other.batch_texts)
        self.batches += other.batches
        self.texts += other.texts
        self.tokens += other.tokens
        self.padding += other.padding
        self.compute_s += other.compute_s
        self.failed_batches += other.failed_batches


@dataclass(slots=True, kw_only=True)
class ClassifierCounts(BatchCounts):
    """Counters of an engine since its start."""

    skipped_texts: int
    """Texts not computed because their client disconnected or their request failed."""
    agreement: float | None
    """Share of answers that are equal to float32's; None for float32."""
    tokenize_s: float
    queued_tokens: int
    """Tokens waiting now."""
    cache_hits: int = 0
    """Texts found in the result cache; 0 without a cache."""
    cache_misses: int = 0


def write_counts(registry: Registry, model: str, counts: ClassifierCounts) -> None:
    totals = {
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
    for metric, total in totals.items():
        registry.counter(metric, model).value = float(total)
    registry.histogram(table.CLASSIFIER_BATCH_TEXTS, model).set(counts.batch_texts)
    registry.gauge(table.CLASSIFIER_QUEUED_TOKENS, model).value = float(counts.queued_tokens)
    if counts.agreement is not None:
        registry.gauge(table.CLASSIFIER_AGREEMENT, model).value = counts.agreement


def write_drift(registry: Registry, model: str, snapshot: DriftSnapshot) -> None:
    for label, texts in snapshot.labels.items():
        registry.counter(table.CLASSIFIER_LABELS, model, label).value = float(texts)
    bins = len(snapshot.confidence)
    for number, texts in enumerate(accumulate(snapshot.confidence), 1):
        below = registry.counter(table.CLASSIFIER_CONFIDENCE, model, f"{number / bins:g}")
        below.value = float(texts)
    for power, texts in enumerate(accumulate(snapshot.length)):
        end = "+Inf" if power == len(snapshot.length) - 1 else str(2**power)
        registry.counter(table.CLASSIFIER_CHARACTERS, model, end).value = float(texts)
    if (drift := snapshot.drift) is not None:
        for quantity, index in asdict(drift).items():
            registry.gauge(table.CLASSIFIER_DRIFT, model, quantity).value = index
