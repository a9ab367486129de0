"""Signals of the simulated pool for autoscaling, as routers report them of a real one."""

import math
from collections import deque
from collections.abc import Iterable, Sequence

from cluster.autoscaling import Objective, PoolSignals
from cluster.simulation.histogram import LogHistogram
from cluster.simulation.replica import SimulatedReplica
from cluster.simulation.requests import SimulatedRequest
from cluster.simulation.settings import Scaling, Slo

QUANTILE = 90
FEW_REQUESTS = 20.0
"""Finished requests after which the mean lengths have changed by half."""


class SignalMeter:
    """Arrivals and latencies over the windows of a router's report."""

    def __init__(self, scaling: Scaling, slo: Slo, startup_s: float) -> None:
        self._scaling, self._slo, self._startup_s = scaling, scaling.slo or slo, startup_s
        self._num_arrived = 0
        self._arrivals: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._ttfts: deque[tuple[float, float, int]] = deque()  # (time, TTFT, weight 1)
        self._steps: deque[tuple[float, float, int]] = deque()  # (time, duration, tokens)
        # Finished requests since the last reading: their number, prefill and decode tokens.
        self._finished = [0, 0, 0]
        self._prefill_each = self._decode_each = 0.0

    def add_arrival(self) -> None:
        self._num_arrived += 1

    def add_ttft(self, now_s: float, ttft_s: float) -> None:
        self._ttfts.append((now_s, ttft_s, 1))

    def add_finished(self, request: SimulatedRequest) -> None:
        self._finished[0] += 1
        self._finished[1] += request.spec.prompt_tokens - request.cached_tokens
        self._finished[2] += request.spec.completion_tokens

    def read(
        self, now_s: float, target: int, ready: Sequence[SimulatedReplica], queued: int
    ) -> PoolSignals:
        self._update_lengths()
        self._arrivals.append((now_s, self._num_arrived))
        while self._arrivals[0][0] < now_s - self._scaling.rate_window_s:
            self._arrivals.popleft()
        since_s, before = self._arrivals[0]
        rate = (self._num_arrived - before) / (now_s - since_s) if now_s > since_s else 0.0
        loads = [replica.engine.load for replica in ready]
        waiting = queued + sum(load.waiting for load in loads)
        self._add_steps(now_s, ready)
        objectives = (
            self._objective("ttft_p90_s", self._slo.ttft_s, self._ttfts, now_s),
            self._objective("itl_p90_s", self._slo.itl_s, self._steps, now_s),
        )
        return PoolSignals(
            target=target,
            running=len(ready),
            age_s=0.0,
            requests_per_s=rate,
            prefill_per_s=rate * self._prefill_each,
            decode_per_s=rate * self._decode_each,
            in_flight=float(sum(load.in_flight for load in loads)),
            queued=float(queued),
            queued_tokens=waiting * self._prefill_each,
            kv_usage=sum(load.kv_cache_usage for load in loads) / max(1, len(loads)),
            startup_s=self._startup_s,
            objectives=tuple(each for each in objectives if each.limit_s < math.inf),
        )

    def _update_lengths(self) -> None:
        num, prefill_tokens, decode_tokens = self._finished
        if num:
            is_known = self._prefill_each or self._decode_each
            weight = num / (num + FEW_REQUESTS) if is_known else 1.0
            self._prefill_each += weight * (prefill_tokens / num - self._prefill_each)
            self._decode_each += weight * (decode_tokens / num - self._decode_each)
        self._finished = [0, 0, 0]

    def _add_steps(self, now_s: float, ready: Iterable[SimulatedReplica]) -> None:
        """Sample the steps in progress, each weighted by its tokens until the next reading."""
        for step_s, num_streams in (replica.engine.current_step for replica in ready):
            if num_streams and step_s:
                tokens = round(num_streams * self._scaling.every_s / step_s)
                self._steps.append((now_s, step_s, tokens))

    def _objective(
        self, name: str, limit_s: float, values: deque[tuple[float, float, int]], now_s: float
    ) -> Objective:
        """Return an objective over the latency window; older values are dropped."""
        while values and values[0][0] < now_s - self._scaling.latency_window_s:
            values.popleft()
        histogram = LogHistogram()
        for _, value, weight in values:
            histogram.add(value, weight)
        return Objective(name, limit_s, histogram.percentile(QUANTILE), histogram.weight)
