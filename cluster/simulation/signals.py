"""What autoscaling is told of the simulated pool: what the live routers report of a real one."""

import math
from collections import deque
from collections.abc import Sequence

from cluster.autoscaling import Objective, PoolSignals
from cluster.simulation.calls import Call
from cluster.simulation.histogram import Histogram
from cluster.simulation.replica import Replica
from cluster.simulation.settings import Scaling, Slo

QUANTILE = 90
FEW_REQUESTS = 20.0
"""So many must end until the mean lengths have half changed."""


class Signals:
    """Follows arrivals and latencies over the windows of a report."""

    def __init__(self, scaling: Scaling, slo: Slo, startup_s: float) -> None:
        self._scaling, self._slo, self._startup_s = scaling, scaling.slo or slo, startup_s
        self._arrived = 0
        self._arrivals: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._ttfts: deque[tuple[float, float]] = deque()
        self._steps: deque[tuple[float, float, int]] = deque()
        self._ended = [0, 0, 0]
        self._prefill_each = self._decode_each = 0.0

    def arrived(self) -> None:
        """A request has come."""
        self._arrived += 1

    def first_token(self, now_s: float, ttft_s: float) -> None:
        """It got its first token."""
        self._ttfts.append((now_s, ttft_s))

    def ended(self, call: Call) -> None:
        """It has ended well."""
        request = call.request
        self._ended[0] += 1
        self._ended[1] += request.prompt_tokens - call.cached_tokens
        self._ended[2] += request.completion_tokens

    def read(
        self, now_s: float, target: int, replicas: Sequence[Replica], queued: int
    ) -> PoolSignals:
        """The signals now; ``replicas``: those that are ready."""
        self._follow_lengths()
        self._arrivals.append((now_s, self._arrived))
        while self._arrivals[0][0] < now_s - self._scaling.rate_window_s:
            self._arrivals.popleft()
        since_s, before = self._arrivals[0]
        rate = (self._arrived - before) / (now_s - since_s) if now_s > since_s else 0.0
        loads = [replica.engine.load for replica in replicas]
        waiting = queued + sum(load.waiting for load in loads)
        objectives = self._ttft(now_s), self._itl(now_s, replicas)
        return PoolSignals(
            target=target,
            running=len(replicas),
            age_s=0.0,
            requests_per_s=rate,
            prefill_per_s=rate * self._prefill_each,
            decode_per_s=rate * self._decode_each,
            in_flight=float(sum(load.running + load.waiting for load in loads)),
            queued=float(queued),
            queued_tokens=waiting * self._prefill_each,
            kv_usage=sum(load.kv_cache_usage for load in loads) / max(1, len(loads)),
            startup_s=self._startup_s,
            objectives=tuple(each for each in objectives if each.limit_s < math.inf),
        )

    def _follow_lengths(self) -> None:
        ended, prefill, decode = self._ended
        if ended:
            known = self._prefill_each or self._decode_each
            weight = ended / (ended + FEW_REQUESTS) if known else 1.0
            self._prefill_each += weight * (prefill / ended - self._prefill_each)
            self._decode_each += weight * (decode / ended - self._decode_each)
        self._ended = [0, 0, 0]

    def _ttft(self, now_s: float) -> Objective:
        while self._ttfts and self._ttfts[0][0] < now_s - self._scaling.latency_window_s:
            self._ttfts.popleft()
        lately = Histogram()
        for _, ttft_s in self._ttfts:
            lately.add(ttft_s)
        observed_s = lately.percentile(QUANTILE)
        return Objective("ttft_p90_s", self._slo.ttft_s, observed_s, lately.weight)

    def _itl(self, now_s: float, replicas: Sequence[Replica]) -> Objective:
        """Of the steps that are under way when it is looked; of shorter ones there are more."""
        for step_s, streams in (replica.engine.step for replica in replicas):
            if streams and step_s:
                gaps = round(streams * self._scaling.every_s / step_s)
                self._steps.append((now_s, step_s, gaps))
        while self._steps and self._steps[0][0] < now_s - self._scaling.latency_window_s:
            self._steps.popleft()
        lately = Histogram()
        for _, step_s, streams in self._steps:
            lately.add(step_s, streams)
        observed_s = lately.percentile(QUANTILE)
        return Objective("itl_p90_s", self._slo.itl_s, observed_s, lately.weight)
