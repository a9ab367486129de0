"""What came of a simulation."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.simulation.calls import Call, Outcome
from cluster.simulation.histogram import Histogram
from cluster.simulation.settings import Slo


@dataclass(frozen=True, slots=True)
class Sample:
    """The pool at one moment."""

    at_s: float
    arrivals: int
    """Since the sample before."""
    ready: int
    starting: int
    ongoing: int
    queued: int


@dataclass(frozen=True, slots=True)
class ScaleEvent:
    """The target was changed."""

    at_s: float
    before: int
    after: int
    cause: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaTotals:
    """What one replica did."""

    id: str
    lived_s: float
    """From the moment its start was asked for to its end; what it costs."""
    served_s: float
    """Of these, the time that it could be given requests."""
    ongoing_s: float
    work_s: float


@dataclass(slots=True)
class Result:
    """Everything that was found."""

    slo: Slo
    calls: Sequence[Call] = ()
    replicas: Sequence[ReplicaTotals] = ()
    samples: list[Sample] = field(default_factory=list)
    scale_events: list[ScaleEvent] = field(default_factory=list)
    itl_s: Histogram = field(default_factory=Histogram)
    """Every time between two tokens."""

    def count(self, outcome: Outcome) -> int:
        """How many requests ended so."""
        return sum(call.outcome is outcome for call in self.calls)

    @property
    def slo_attainment(self) -> float:
        """The share of all requests that got what the objectives say; 1 without requests."""
        good = sum(self.is_good(call) for call in self.calls)
        return good / len(self.calls) if self.calls else 1.0

    def is_good(self, call: Call) -> bool:
        """Whether a request met the objectives."""
        ttft_s = call.ttft_s
        return (
            call.outcome is Outcome.DONE
            and ttft_s is not None
            and ttft_s <= self.slo.ttft_s
            and call.itl_s <= self.slo.itl_s
        )

    @property
    def hit_rate(self) -> float:
        """The share of the prompt tokens of answered requests that were cached."""
        done = [call for call in self.calls if call.outcome is Outcome.DONE]
        tokens = sum(call.request.prompt_tokens for call in done)
        return sum(call.cached_tokens for call in done) / tokens if tokens else 0.0

    @property
    def replica_hours(self) -> float:
        """From the moments at which starts were asked for."""
        return sum(replica.lived_s for replica in self.replicas) / 3600

    def ttft_s(self) -> Histogram:
        """Times to the first token."""
        found = Histogram()
        for call in self.calls:
            if (ttft_s := call.ttft_s) is not None:
                found.add(ttft_s)
        return found

    def request_s(self) -> Histogram:
        """Times to the end of a good answer."""
        found = Histogram()
        for call in self.calls:
            if call.outcome is Outcome.DONE and call.ended_s is not None:
                found.add(call.ended_s - call.request.arrival_s)
        return found

    def max_over_mean(self, what: str) -> float:
        """The busiest replica against the mean, by ``work_s`` or ``ongoing_s`` for each second.

        Replicas that served for less than a tenth of the longest time are left out.
        """
        longest_s = max((replica.served_s for replica in self.replicas), default=0.0)
        loads = [
            getattr(replica, what) / replica.served_s
            for replica in self.replicas
            if replica.served_s > 0.1 * longest_s
        ]
        mean = sum(loads) / len(loads) if loads else 0.0
        return max(loads) / mean if mean else 1.0

    def summary(self, cost_per_replica_hour: float) -> dict[str, float]:
        """The numbers, by the names under which they are printed."""
        ttft_s, request_s = self.ttft_s(), self.request_s()
        outcomes = Counter(call.outcome for call in self.calls)
        latencies = {"ttft_s": ttft_s, "itl_s": self.itl_s, "request_s": request_s}
        return {
            "requests": len(self.calls),
            **{outcome.value: outcomes[outcome] for outcome in Outcome},
            "slo_attainment": self.slo_attainment,
            **{
                name.replace("_s", f"_p{percent}_s"): found.percentile(percent)
                for name, found in latencies.items()
                for percent in (50, 90, 99)
            },
            "hit_rate": self.hit_rate,
            "max_over_mean_load": self.max_over_mean("ongoing_s"),
            "max_over_mean_work": self.max_over_mean("work_s"),
            "replicas_most": max((s.ready + s.starting for s in self.samples), default=0),
            "replica_hours": self.replica_hours,
            "cost": self.replica_hours * cost_per_replica_hour,
            "scale_events": len(self.scale_events),
        }
