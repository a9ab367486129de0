"""Quantile estimates from histogram buckets, as PromQL's ``histogram_quantile`` computes them."""

from collections.abc import Sequence


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return the value that ``share`` of the observations do not exceed, or None if there are none.

    Interpolates linearly within a bucket. Observations above the highest bound count as that
    bound, so a result equal to it may be too low. ``bounds`` ascend; ``counts`` are not cumulative
    and one more.
    """
    rank = share * sum(counts)
    if not rank:
        return None
    below, lower = 0, 0.0
    for upper, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return lower + (upper - lower) * (rank - below) / count
        below += count
        lower = upper
    return bounds[-1]
