"""Ray Serve's own autoscaling of one deployment, by what its source does (ray 2.60).

``replica_queue_length_autoscaling_policy``: replicas = ongoing / ``target_ongoing_requests``, the
ongoing requests being the mean of what was reported over ``look_back_period_s``; a change must be
wanted without a break for ``upscale_delay_s`` or ``downscale_delay_s``. Replicas report every 10 s.
"""

import math
from collections import deque
from dataclasses import dataclass

from cluster.autoscaling import Decision, PoolSignals

METRICS_INTERVAL_S = 10.0
LOOK_BACK_S = 30.0


@dataclass(frozen=True, slots=True)
class RaySettings:
    """The fields of ``AutoscalingConfig`` that are tuned; the delays have Serve's defaults."""

    target_in_flight: float
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


class RayPolicy:
    """One deployment's policy with its state."""

    def __init__(self, settings: RaySettings, low: int, high: int) -> None:
        self._settings = settings
        self._low, self._high = low, high
        self._reports: deque[tuple[float, float]] = deque()
        self._wanted_since: float | None = None
        self._up = False

    def decide(self, now: float, signals: PoolSignals) -> Decision:
        """The target at ``now`` (seconds)."""
        target = self._target(now, signals)
        return Decision(target, target, "ongoing", f"{signals.ongoing:.0f} requests")

    def _target(self, now: float, signals: PoolSignals) -> int:
        if not self._reports or now - self._reports[-1][0] >= METRICS_INTERVAL_S:
            self._reports.append((now, signals.ongoing + signals.queued))
        while self._reports[0][0] < now - LOOK_BACK_S:
            self._reports.popleft()
        mean = math.fsum(value for _, value in self._reports) / len(self._reports)
        if signals.running == 0:
            return max(1, signals.target) if mean else signals.target
        desired = math.ceil(mean / self._settings.target_in_flight - 1e-9)
        return max(self._low, min(self._high, self._delayed(now, desired, signals.target)))

    def _delayed(self, now: float, desired: int, target: int) -> int:
        up = desired > target
        if desired == target or up != self._up:
            self._wanted_since = None
        if desired == target:
            return target
        self._up = up
        if self._wanted_since is None:
            self._wanted_since = now
        delay_s = self._settings.upscale_delay_s if up else self._settings.downscale_delay_s
        if now - self._wanted_since < delay_s:
            return target
        self._wanted_since = None
        return desired if up or target == 1 else max(1, desired)
