"""What a rate will be when a replica that is asked for now can answer.

Three simple forecasts (it stays; its trend goes on; it goes as it went a day ago) are made all the
time, and the one that erred least lately is believed. How far the truth lay above it then is
learned as a margin, so that traffic that jumps is given more room than traffic that glides.
"""

import math
from collections import deque
from dataclasses import dataclass, field

LEVEL_S = 5.0
"""Time constant of the level: long enough for a few arrivals, short beside a start-up."""
TREND_S = 10.0
DAMPING_S = 300.0
"""A trend is believed for about so long."""
CALM_S = 120.0
"""Time constant of the level that is believed while nothing happens: arrivals are noisy."""
FALL_S = 30.0
"""The same while the quick level is far below it: a burst has ended."""
FAST_S = 15.0
"""Time constant of what counts as having come true; the mean age of a percentile of 30 s."""
ERROR_S = 1800.0
OUTLIER = 4.0
"""Deviations beyond which a single value is not believed before a second one says the same."""
SIGNIFICANT = 2.5
"""Mean deviations of single values that a rise must have, where jumps are usual (a margin of 1);
where they are not, as many times more."""
LEAST_MARGIN = 0.3
MARGIN_QUANTILE = 0.985
MARGIN_STEP = 0.02
MAX_MARGIN = 3.0
PEAK_S = 4 * 3600.0
"""Time constant with which the highest rate is forgotten."""
MEAN_S = 3600.0
"""Time constant of the usual rate, against which margins are measured."""
BINS = 96
"""Parts of a season: quarters of an hour of a day."""


@dataclass(slots=True)
class _Season:
    """The mean of each part of the period, of the times that it was seen."""

    period_s: float
    means: list[float | None] = field(default_factory=lambda: [None] * BINS)
    _bin: int = -1
    _sum: float = 0.0
    _weight: float = 0.0

    def add(self, now: float, value: float, dt: float) -> None:
        index = int(now % self.period_s / self.period_s * BINS) % BINS
        if index != self._bin:
            self._store()
            self._bin, self._sum, self._weight = index, 0.0, 0.0
        self._sum += value * dt
        self._weight += dt

    def _store(self) -> None:
        if self._weight:
            mean, old = self._sum / self._weight, self.means[self._bin]
            self.means[self._bin] = mean if old is None else 0.5 * old + 0.5 * mean

    def at(self, now: float) -> float | None:
        """The usual value then, between the middles of two parts; None: not seen yet."""
        place = now % self.period_s / self.period_s * BINS - 0.5
        low = math.floor(place)
        before, after = self.means[low % BINS], self.means[(low + 1) % BINS]
        if before is None or after is None:
            return None
        return before + (after - before) * (place - low)


class Forecast:
    """Follows one rate. ``update`` it with every value, then ask ``ahead``."""

    def __init__(self, period_s: float = 86_400.0) -> None:
        self.level = 0.0
        self.trend = 0.0
        """Change of the level each second."""
        self.margin = 0.15
        """Learned room above a forecast, as a share of it where the rate is the usual one; it grows
        with the root of the rate, as the noise of arrivals does."""
        self.calm = 0.0
        """The level of the last minutes."""
        self._mean = self._peak = 0.0
        self.recent = 0.0
        """The rate of the last half minute: of the time that percentiles are taken from."""
        self._scale = 0.0
        self._at: float | None = None
        self._doubted = 0.0
        self._season = _Season(period_s)
        self._made: deque[tuple[float, tuple[float, ...]]] = deque()
        self._errors = [0.0, 0.0, 0.0]

    def update(self, now: float, value: float, horizon_s: float) -> None:
        """Take in ``value`` at ``now`` (seconds); a clock that went back only starts anew there.

        ``horizon_s`` is how far ahead forecasts are needed, so that those are judged.
        """
        if self._at is None or now <= self._at:
            if self._at is None:
                self.level = self.recent = self.calm = self._mean = value
            self._at = now
            self._made.clear()
            return
        dt = min(now - self._at, LEVEL_S)
        self._at = now
        value = self._believable(value)
        self._season.add(now, value, dt)
        before = self.level
        self.level += self.trend * dt
        self.level += (1 - math.exp(-dt / LEVEL_S)) * (value - self.level)
        self.level = max(0.0, self.level)
        self.trend += (1 - math.exp(-dt / TREND_S)) * ((self.level - before) / dt - self.trend)
        calm_s = FALL_S if self._falls else CALM_S
        self.calm += (1 - math.exp(-dt / calm_s)) * (value - self.calm)
        self._mean += (1 - math.exp(-dt / MEAN_S)) * (value - self._mean)
        self.recent += (1 - math.exp(-dt / FAST_S)) * (value - self.recent)
        self._peak = max(self.recent, self._peak * math.exp(-dt / PEAK_S))
        self._judge(now, dt)
        self._made.append((now + horizon_s, self._experts(now, horizon_s)))

    def ahead(self, horizon_s: float) -> float:
        """The rate to be ready for ``horizon_s`` from now: the best forecast with its margin."""
        if self._at is None:
            return 0.0
        guesses = self._experts(self._at, horizon_s)
        best = min(range(len(guesses)), key=self._errors.__getitem__)
        guess, spread = guesses[best], self._spread(guesses[best])
        # A burst is given room for its noise, but not for another burst on top of it.
        most = max(self._peak, guess + LEAST_MARGIN * spread)
        return max(min(guess + self.margin * spread, most), self._rising(horizon_s))

    @property
    def steady(self) -> float:
        """The rate without noise: the calm level, or the quick one where that rises in earnest."""
        return self.level if self._rises else self.calm

    @property
    def _rises(self) -> bool:
        usual = min(1.0, max(LEAST_MARGIN, self.margin))
        return self.level - self.calm > SIGNIFICANT / usual * self._scale

    @property
    def _falls(self) -> bool:
        return self.calm - self.level > SIGNIFICANT * self._scale

    def _spread(self, guess: float) -> float:
        return math.sqrt(guess * self._mean)

    def _rising(self, horizon_s: float) -> float:
        """Where a rise that is more than noise leads; a burst has to be met before it is usual."""
        return self._experts(self._at or 0.0, horizon_s)[1] if self._rises else 0.0

    def _believable(self, value: float) -> float:
        off = value - self.level
        limit = OUTLIER * max(self._scale, 0.05 * self.level)
        doubtful = abs(off) > limit > 0
        believed = not doubtful or off * self._doubted > 0
        self._doubted = off if doubtful else 0.0
        off = off if believed else math.copysign(limit, off)
        self._scale += 0.05 * (abs(off) - self._scale)
        return self.level + off

    def _experts(self, now: float, horizon_s: float) -> tuple[float, ...]:
        rise = self.trend * DAMPING_S * (1 - math.exp(-horizon_s / DAMPING_S))
        trend = max(0.0, self.level + rise)
        usual, then = self._season.at(now), self._season.at(now + horizon_s)
        season = trend
        if usual and then is not None:
            season = self.calm * min(4.0, max(0.25, then / usual))
        return self.calm, trend, season

    def _judge(self, now: float, dt: float) -> None:
        """Compare what was forecast for now with what is."""
        while self._made and self._made[0][0] <= now:
            _, guesses = self._made.popleft()
            weight = min(1.0, dt / ERROR_S * 10)
            for index, guess in enumerate(guesses):
                error = abs(guess - self.recent)
                self._errors[index] += weight * (error - self._errors[index])
            best = guesses[min(range(len(guesses)), key=self._errors.__getitem__)]
            above = self.recent - best > self.margin * self._spread(best)
            step = MARGIN_QUANTILE if above else MARGIN_QUANTILE - 1
            self.margin = min(MAX_MARGIN, max(0.0, self.margin + MARGIN_STEP * step))
