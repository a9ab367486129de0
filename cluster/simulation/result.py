"""Result of a simulation."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.simulation.histogram import LogHistogram
from cluster.simulation.requests import Outcome, SimulatedRequest
from cluster.simulation.settings import Slo


@dataclass(frozen=True, slots=True)
class Sample:
    """State of the pool at one moment."""

    at_s: float
    arrivals: int
    """Requests since the previous sample."""
    ready: int
    starting: int
    in_flight: int
    queued: int


@dataclass(frozen=True, slots=True)
class ScaleEvent:
    """Change of the target."""

    at_s: float
    before: int
    after: int
    cause: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaTotals:
    """Totals of one replica."""

    id: str
    lived_s: float
    """Time from the decision to start it until its end; the time that is paid for."""
    served_s: float
    """Time in which it accepted requests."""
    in_flight_s: float
    """Sum of the times that requests spent there."""
    work_s: float
    """Time that its requests would take on an otherwise idle engine."""


@dataclass(slots=True)
class Result:
    """Requests, replicas and measurements of a simulation."""

    slo: Slo
    requests: Sequence[SimulatedRequest] = ()
    replicas: Sequence[ReplicaTotals] = ()
    samples: list[Sample] = field(default_factory=list)
    scale_events: list[ScaleEvent] = field(default_factory=list)
    itl_s: LogHistogram = field(default_factory=LogHistogram)
    """All times between two tokens."""

    def count(self, outcome: Outcome) -> int:
        return sum(request.outcome is outcome for request in self.requests)

    @property
    def slo_attainment(self) -> float:
        """Share of all requests that met the objectives; 1 without requests."""
        num_met = sum(self.meets_slo(request) for request in self.requests)
        return num_met / len(self.requests) if self.requests else 1.0

    def meets_slo(self, request: SimulatedRequest) -> bool:
        ttft_s = request.ttft_s
        return (
            request.outcome is Outcome.DONE
            and ttft_s is not None
            and ttft_s <= self.slo.ttft_s
            and request.itl_s <= self.slo.itl_s
        )

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens of answered requests that were cached."""
        done = [request for request in self.requests if request.outcome is Outcome.DONE]
        tokens = sum(request.spec.prompt_tokens for request in done)
        return sum(request.cached_tokens for request in done) / tokens if tokens else 0.0

    @property
    def replica_hours(self) -> float:
        """Replica-hours, each counted from the decision to start the replica."""
        return sum(replica.lived_s for replica in self.replicas) / 3600

    def ttft_s(self) -> LogHistogram:
        return LogHistogram(s for request in self.requests if (s := request.ttft_s) is not None)

    def request_s(self) -> LogHistogram:
        """Return the end-to-end times of answered requests."""
        done = [request for request in self.requests if request.outcome is Outcome.DONE]
        return LogHistogram(r.ended_s - r.spec.arrival_s for r in done if r.ended_s is not None)

    def max_over_mean(self, field_name: str) -> float:
        """Return the load of the busiest replica relative to the mean.

        The load is a field of ``ReplicaTotals`` (``work_s`` or ``in_flight_s``) per second of
        service. Replicas that served for less than a tenth of the longest time are left out.
        """
        longest_s = max((replica.served_s for replica in self.replicas), default=0.0)
        loads = [
            getattr(replica, field_name) / replica.served_s
            for replica in self.replicas
            if replica.served_s > 0.1 * longest_s
        ]
        mean = sum(loads) / len(loads) if loads else 0.0
        return max(loads) / mean if mean else 1.0

    def summary(self, cost_per_replica_hour: float) -> dict[str, float]:
        """Return the numbers that ``tandem simulate`` prints, by name."""
        ttft_s, request_s = self.ttft_s(), self.request_s()
        outcomes = Counter(request.outcome for request in self.requests)
        latencies = {"ttft_s": ttft_s, "itl_s": self.itl_s, "request_s": request_s}
        return {
            "requests": len(self.requests),
            **{outcome.value: outcomes[outcome] for outcome in Outcome},
            "slo_attainment": self.slo_attainment,
            **{
                name.replace("_s", f"_p{percent}_s"): histogram.percentile(percent)
                for name, histogram in latencies.items()
                for percent in (50, 90, 99)
            },
            "hit_rate": self.hit_rate,
            "max_over_mean_load": self.max_over_mean("in_flight_s"),
            "max_over_mean_work": self.max_over_mean("work_s"),
            "replicas_most": max((s.ready + s.starting for s in self.samples), default=0),
            "replica_hours": self.replica_hours,
            "cost": self.replica_hours * cost_per_replica_hour,
            "scale_events": len(self.scale_events),
        }
