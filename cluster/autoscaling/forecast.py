"""Forecast of a rate at the time when a replica that is requested now can serve.

Three simple forecasts run all the time: the rate stays, its trend continues, or it changes as it
did a day ago. The one with the smallest recent error is used. A margin above it is learned from the
errors, so traffic that jumps gets more room than traffic that glides.
"""

import math
from collections import deque
from dataclasses import dataclass, field

# Time constants of exponential means, in seconds. Tuned on the traces of `bench autoscale`.
LEVEL_S = 5.0
"""Quick level: long enough for a few arrivals, short relative to a start-up."""
TREND_S = 10.0
CALM_S = 120.0
"""Calm level, used while nothing happens, because arrivals are noisy."""
FALL_S = 30.0
"""Calm level while the quick level is far below it: a burst has ended."""
FAST_S = 15.0
"""Recent rate, against which forecasts are scored; the mean age in a percentile over 30 s."""
ERROR_S = 1800.0
PEAK_S = 4 * 3600.0
MEAN_S = 3600.0
"""Usual rate, relative to which margins are measured."""

DAMPING_S = 300.0
"""Time for which a trend is extrapolated, about."""
OUTLIER = 4.0
"""Deviations beyond which a value is cut until a second value confirms it."""
SIGNIFICANT = 2.5
"""Deviations of single values that count as a rise if jumps are usual (a margin of 1); divided by
the margin if they are not."""
MIN_MARGIN = 0.3
MARGIN_QUANTILE = 0.985
"""Share of forecasts that the margin should cover."""
MARGIN_STEP = 0.02
MAX_MARGIN = 3.0
SEASON_BINS = 96
"""Parts of a season: quarters of an hour of a day."""


@dataclass(slots=True)
class _Season:
    """Mean rate of each part of the period, halving the weight of the past each time."""

    period_s: float
    means: list[float | None] = field(default_factory=lambda: [None] * SEASON_BINS)
    _bin: int = -1
    _sum: float = 0.0
    _weight: float = 0.0

    def add(self, now: float, value: float, dt: float) -> None:
        index = int(now % self.period_s / self.period_s * SEASON_BINS) % SEASON_BINS
        if index != self._bin:
            self._store_bin()
            self._bin, self._sum, self._weight = index, 0.0, 0.0
        self._sum += value * dt
        self._weight += dt

    def _store_bin(self) -> None:
        if self._weight:
            mean, old = self._sum / self._weight, self.means[self._bin]
            self.means[self._bin] = mean if old is None else 0.5 * old + 0.5 * mean

    def at(self, now: float) -> float | None:
        """Return the usual rate, interpolated between bin centers; None if not seen yet."""
        position = now % self.period_s / self.period_s * SEASON_BINS - 0.5
        low = math.floor(position)
        before, after = self.means[low % SEASON_BINS], self.means[(low + 1) % SEASON_BINS]
        if before is None or after is None:
            return None
        return before + (after - before) * (position - low)


class Forecast:
    """Forecast of one rate, updated with every value of it."""

    def __init__(self, period_s: float = 86_400.0) -> None:
        self.level = 0.0
        """Quick level."""
        self.trend = 0.0
        """Change of the level per second."""
        self.calm = 0.0
        """Level of the last minutes."""
        self.recent = 0.0
        """Rate of the last half minute, the span of the percentiles."""
        self.margin = 0.15
        """Learned room above a forecast, as a share of it at the usual rate. It grows with the
        square root of the rate, as the noise of arrivals does."""
        self._mean = self._peak = 0.0
        self._deviation = 0.0  # mean absolute deviation of single values from the level
        self._updated_at: float | None = None
        self._unconfirmed = 0.0  # deviation of the last value if it was an outlier
        self._season = _Season(period_s)
        self._made: deque[tuple[float, tuple[float, ...]]] = deque()  # (due time, forecasts)
        self._errors = [0.0, 0.0, 0.0]

    def update(self, now: float, value: float, horizon_s: float) -> None:
        """Add the rate at ``now`` (seconds); a clock that went back restarts from there.

        ``horizon_s`` is the time ahead for which forecasts are used, so that those are scored.
        """
        if self._updated_at is None or now <= self._updated_at:
            if self._updated_at is None:
                self.level = self.recent = self.calm = self._mean = value
            self._updated_at = now
            self._made.clear()
            return
        dt = min(now - self._updated_at, LEVEL_S)
        self._updated_at = now
        value = self._cut_outlier(value)
        self._season.add(now, value, dt)
        before = self.level
        self.level += self.trend * dt
        self.level += _weight(dt, LEVEL_S) * (value - self.level)
        self.level = max(0.0, self.level)
        self.trend += _weight(dt, TREND_S) * ((self.level - before) / dt - self.trend)
        self.calm += _weight(dt, FALL_S if self._is_falling else CALM_S) * (value - self.calm)
        self._mean += _weight(dt, MEAN_S) * (value - self._mean)
        self.recent += _weight(dt, FAST_S) * (value - self.recent)
        self._peak = max(self.recent, self._peak * math.exp(-dt / PEAK_S))
        self._score_forecasts(now, dt)
        self._made.append((now + horizon_s, self._forecasts(now, horizon_s)))

    def ahead(self, horizon_s: float) -> float:
        """Return the rate to be ready for in ``horizon_s``: the best forecast and its margin."""
        if self._updated_at is None:
            return 0.0
        forecasts = self._forecasts(self._updated_at, horizon_s)
        best = self._best(forecasts)
        noise = self._noise(best)
        # A burst gets room for its noise, but not for another burst on top of it.
        cap = max(self._peak, best + MIN_MARGIN * noise)
        # A burst must be met before bursts are usual: follow the trend of a significant rise.
        rising = forecasts[1] if self._is_rising else 0.0
        return max(min(best + self.margin * noise, cap), rising)

    @property
    def steady(self) -> float:
        """Rate without noise: the calm level, or the quick one during a significant rise."""
        return self.level if self._is_rising else self.calm

    @property
    def _is_rising(self) -> bool:
        margin = min(1.0, max(MIN_MARGIN, self.margin))
        return self.level - self.calm > SIGNIFICANT / margin * self._deviation

    @property
    def _is_falling(self) -> bool:
        return self.calm - self.level > SIGNIFICANT * self._deviation

    def _noise(self, rate: float) -> float:
        return math.sqrt(rate * self._mean)

    def _cut_outlier(self, value: float) -> float:
        """Return the value; cut if it is an outlier and the last value was not one as well."""
        deviation = value - self.level
        limit = OUTLIER * max(self._deviation, 0.05 * self.level)
        is_outlier = abs(deviation) > limit > 0
        is_confirmed = deviation * self._unconfirmed > 0
        self._unconfirmed = deviation if is_outlier else 0.0
        if is_outlier and not is_confirmed:
            deviation = math.copysign(limit, deviation)
        self._deviation += 0.05 * (abs(deviation) - self._deviation)
        return self.level + deviation

    def _forecasts(self, now: float, horizon_s: float) -> tuple[float, ...]:
        """Return the rate in ``horizon_s`` if it stays, by its trend, and by the season."""
        rise = self.trend * DAMPING_S * (1 - math.exp(-horizon_s / DAMPING_S))
        by_trend = max(0.0, self.level + rise)
        usual_now, usual_then = self._season.at(now), self._season.at(now + horizon_s)
        by_season = by_trend
        if usual_now and usual_then is not None:
            by_season = self.calm * min(4.0, max(0.25, usual_then / usual_now))
        return self.calm, by_trend, by_season

    def _best(self, forecasts: tuple[float, ...]) -> float:
        return forecasts[min(range(len(forecasts)), key=self._errors.__getitem__)]

    def _score_forecasts(self, now: float, dt: float) -> None:
        """Compare the forecasts that were made for now with the recent rate."""
        while self._made and self._made[0][0] <= now:
            _, forecasts = self._made.popleft()
            weight = min(1.0, dt / ERROR_S * 10)
            for index, forecast in enumerate(forecasts):
                error = abs(forecast - self.recent)
                self._errors[index] += weight * (error - self._errors[index])
            best = self._best(forecasts)
            # Quantile tracking: steps up and down balance if the margin covers the quantile.
            is_above = self.recent - best > self.margin * self._noise(best)
            step = MARGIN_QUANTILE if is_above else MARGIN_QUANTILE - 1
            self.margin = min(MAX_MARGIN, max(0.0, self.margin + MARGIN_STEP * step))


def _weight(dt: float, time_constant_s: float) -> float:
    """Return the weight of a new value in an exponential mean."""
    return 1 - math.exp(-dt / time_constant_s)
