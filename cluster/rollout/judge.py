"""Comparison of the new version of a model with the old one, with a statistical margin.

The new version is *worse* only if it exceeds a limit with ``SURE`` confidence, and *fine* only
after ``min_requests`` answers within all limits. Otherwise more answers are needed (*unknown*). It
is *uncompared* if nothing speaks against it, but a figure of one version is missing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.config import RolloutConfig
from cluster.metrics import quantile, table
from cluster.rollout.figures import Figures

SURE = 2.576
"""Standard errors of a one-sided confidence of 99.5 %, for a rollback."""
LIKELY = 1.645
"""Standard errors of a one-sided confidence of 95 %, for the error rate of a promotion."""
MIN_FAILURES = 3
"""Failed requests without which no error rate is raised."""
MIN_COMPARED = 20
"""Answers of the new version without which lengths, latencies and labels cannot be worse."""
UNLABELED = "unlabeled classifier"
"""Kind of classifiers whose answers have no labels, such as embeddings."""
_SHARE = 0.9  # percentile of the latencies
_NOISE_S = {"TTFT": 0.02, "inter-token latency": 0.005, "latency": 0.02}
"""Differences of latencies that do not matter, in seconds: about the resolution of the buckets."""

Outcome = Literal["worse", "unknown", "uncompared", "fine"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a comparison, with its figures in words."""

    outcome: Outcome
    reason: str


def judge(kind: str, rule: RolloutConfig, old: Figures, new: Figures) -> Verdict:
    """Compare the versions of a pool of this kind ("generator", "classifier", ``UNLABELED``)."""
    checks = list(_checks(kind, rule, old, new))
    for outcome in ("worse", "unknown", "uncompared"):
        if outcome == "unknown" and new.finished < rule.min_requests:
            return Verdict("unknown", f"{new.finished} of {rule.min_requests} answers")
        if found := [check for check in checks if check.outcome == outcome]:
            return Verdict(found[0].outcome, "; ".join(check.reason for check in found))
    return Verdict("fine", "; ".join(check.reason for check in checks))


def _checks(kind: str, rule: RolloutConfig, old: Figures, new: Figures) -> Iterator[Verdict]:
    yield _check_errors(rule, old, new)
    if old.finished < min(MIN_COMPARED, rule.min_requests):
        yield Verdict("uncompared", f"only {old.finished} answers of the old version")
    if kind == "generator":
        yield from _check_latency("TTFT", rule, old, new, table.TTFT_SECONDS.buckets)
        yield from _check_latency("inter-token latency", rule, old, new, table.ITL_SECONDS.buckets)
        yield from _check_length(rule, old, new)
    else:
        yield from _check_latency("latency", rule, old, new, table.REQUEST_SECONDS.buckets)
        if kind != UNLABELED:
            yield _check_agreement(rule, new)


def _check_errors(rule: RolloutConfig, old: Figures, new: Figures) -> Verdict:
    limit = rule.max_error_increase
    shares = f"{new.failed} of {new.finished} failed, before {old.failed} of {old.finished}"
    if new.failed >= MIN_FAILURES and increase(old, new, -SURE) > limit:
        return Verdict("worse", shares)
    return Verdict("fine" if increase(old, new, LIKELY) <= limit else "unknown", shares)


def increase(old: Figures, new: Figures, z: float) -> float:
    """Return a confidence bound of the increase of the error rate: lower if z is negative.

    Newcombe's interval of a difference (1998, method 10), from Wilson's intervals. Without an old
    figure, the old rate counts as 0.
    """
    if not new.finished:
        return 1.0 if z > 0 else -1.0
    new_share, new_bound = new.failed / new.finished, _wilson(new.failed, new.finished, z)
    if not old.finished:
        return new_bound
    old_share, old_bound = old.failed / old.finished, _wilson(old.failed, old.finished, -z)
    distance = math.hypot(new_bound - new_share, old_share - old_bound)
    return new_share - old_share + math.copysign(distance, z)


def _wilson(successes: int, trials: int, z: float) -> float:
    """Return Wilson's bound of a share: the upper one if z is positive, else the lower one."""
    share, z_squared = successes / trials, z * z
    center = share + z_squared / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z_squared / (4 * trials * trials))
    return (center + spread) / (1 + z_squared / trials)


def _check_latency(
    name: str, rule: RolloutConfig, old: Figures, new: Figures, bounds: Sequence[float]
) -> Iterator[Verdict]:
    """Compare a percentile; bounds of its rank give its confidence interval."""
    field = {"TTFT": "ttft", "inter-token latency": "itl"}.get(name, "latency")
    old_counts, new_counts = getattr(old, field), getattr(new, field)
    # The gaps of a stream depend on each other, so a stream counts once.
    num_old, num_new = (min(f.finished, sum(getattr(f, field))) for f in (old, new))
    if not num_old and not num_new:  # no request has this figure, such as TTFT without streams
        return
    if not num_old or not num_new:
        yield Verdict("uncompared", f"no {name} of the {'new' if num_old else 'old'} version")
        return
    before = quantile(bounds, old_counts, _SHARE) or 0.0
    now = quantile(bounds, new_counts, _SHARE) or 0.0
    low = quantile(bounds, new_counts, _rank(num_new, -SURE)) or 0.0
    high = quantile(bounds, old_counts, _rank(num_old, SURE)) or 0.0
    text = f"p90 of {name} {now:.3g} s, before {before:.3g} s"
    if num_new >= MIN_COMPARED and low > rule.max_slowdown * high + _NOISE_S[name]:
        yield Verdict("worse", text)
    else:
        is_within = now <= rule.max_slowdown * before + _NOISE_S[name]
        yield Verdict("fine" if is_within else "unknown", text)


def _rank(num: int, z: float) -> float:
    return min(1.0, max(1e-9, _SHARE + z * math.sqrt(_SHARE * (1 - _SHARE) / num)))


def _check_length(rule: RolloutConfig, old: Figures, new: Figures) -> Iterator[Verdict]:
    if not old.tokens and not new.tokens:
        return
    if old.lengths < 2 or new.lengths < 2 or not old.mean_tokens:
        yield Verdict("uncompared", f"lengths of {old.lengths} old and {new.lengths} new answers")
        return
    error = math.sqrt(sum(_variance(f) / f.lengths for f in (old, new)))
    change, limit = abs(new.mean_tokens - old.mean_tokens), rule.max_length_change * old.mean_tokens
    text = f"mean of {new.mean_tokens:.1f} tokens, before {old.mean_tokens:.1f}"
    if change - SURE * error > limit and new.lengths >= MIN_COMPARED:
        yield Verdict("worse", text)
    else:
        yield Verdict("fine" if change <= limit else "unknown", text)


def _variance(figures: Figures) -> float:
    num, mean = figures.lengths, figures.mean_tokens
    return max(0.0, figures.squared_tokens - num * mean * mean) / (num - 1)


def _check_agreement(rule: RolloutConfig, new: Figures) -> Verdict:
    text = f"{new.agreed} of {new.compared} labels agree"
    if new.compared < MIN_COMPARED:
        return Verdict("uncompared", text)
    if _wilson(new.agreed, new.compared, SURE) < rule.min_agreement:
        return Verdict("worse", text)
    is_within = new.agreed / new.compared >= rule.min_agreement
    return Verdict("fine" if is_within else "unknown", text)
