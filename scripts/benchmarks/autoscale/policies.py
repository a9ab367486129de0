"""Policies that ours is compared with: Ray Serve's, and an oracle that knows the future."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from cluster.autoscaling import Decision, PoolSignals
from cluster.config import SimConfig
from cluster.simulation.requests import Trace

METRICS_INTERVAL_S = 10.0
"""Interval at which Ray's replicas report their load."""
LOOK_BACK_S = 30.0

SMOOTHING_S = 30.0
"""Window over which the oracle smooths the work. Requests may wait for about this long, so the work
of a window can be done at any time in it."""
STEP_S = 2.0


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Tuned fields of ``AutoscalingConfig``; the default delays are Serve's."""

    target_in_flight: float
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


class RayPolicy:
    """Ray Serve's ``replica_queue_length_autoscaling_policy`` for one deployment (Ray 2.60).

    Replicas = ongoing requests / ``target_ongoing_requests``, where the ongoing requests are the
    mean of the reports of ``look_back_period_s``. A change happens when it has been wanted without
    a break for ``upscale_delay_s`` or ``downscale_delay_s``.
    """

    def __init__(self, settings: RaySettings, low: int, high: int) -> None:
        self._settings = settings
        self._low, self._high = low, high
        self._reports: deque[tuple[float, float]] = deque()
        self._wanted_since: float | None = None
        self._up = False

    def decide(self, now: float, signals: PoolSignals) -> Decision:
        """Return the target at ``now`` (seconds)."""
        target = self._target(now, signals)
        return Decision(target, target, "in_flight", f"{signals.in_flight:.0f} requests")

    def _target(self, now: float, signals: PoolSignals) -> int:
        if not self._reports or now - self._reports[-1][0] >= METRICS_INTERVAL_S:
            self._reports.append((now, signals.in_flight + signals.queued))
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


def work_rates(trace: Trace, engine: SimConfig) -> np.ndarray:
    """Return the smoothed number of replicas that each step keeps busy, shape (steps,)."""
    decode_s_per_token = engine.decode_s_per_token * engine.batch_slowdown
    steps = int(trace.duration_s / STEP_S) + 1
    work = np.zeros(steps)
    for request in trace.requests:
        prefill_s = request.prompt_tokens * engine.prefill_s_per_token
        decode_s = request.completion_tokens * decode_s_per_token
        work[int(request.arrival_s / STEP_S)] += (prefill_s + decode_s) / STEP_S
    width = round(SMOOTHING_S / STEP_S)
    return np.convolve(work, np.ones(width) / width, mode="same")


class OraclePolicy:
    """Replicas for the known future work, each busy for ``load`` of its time.

    Replicas are started one start-up time before they are needed and stopped without a delay. No
    policy with the same start-up time gets far below this bound.
    """

    def __init__(self, rates: np.ndarray, load: float, startup_s: float) -> None:
        ahead = int(startup_s / STEP_S) + 2
        padded = np.concatenate([rates, np.zeros(ahead)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, ahead + 1)[: len(rates)]
        self._targets = np.maximum(1, np.ceil(windows.max(axis=1) / load)).astype(int)

    def decide(self, now: float, _signals: PoolSignals) -> Decision:
        """Return the target at ``now`` (seconds)."""
        step = min(int(now / STEP_S), len(self._targets) - 1)
        target = int(self._targets[step])
        return Decision(target, target, "oracle", "future work is known")
