"""Quantiles of what a histogram counted, as Prometheus' ``histogram_quantile`` gives them."""

from collections.abc import Sequence


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """The value that ``share`` (0 to 1) of the observations do not exceed; None without any.

    Values are taken to lie evenly between a bucket's bounds. What is above all bounds counts as
    the highest bound, so a result that is equal to it may be too low.

    Args:
        bounds: Upper bounds, ascending.
        counts: Observations of each bucket alone; one more than bounds.
        share: Which quantile; 0.5 is the median.
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
