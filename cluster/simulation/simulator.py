"""The simulation: arrivals, routers, replicas that start, drain and fail, and its measurements."""

import heapq
from collections.abc import Callable
from typing import Any

from cluster.routing import RequestView
from cluster.simulation.replica import SimulatedReplica
from cluster.simulation.requests import Outcome, SimulatedRequest, Trace
from cluster.simulation.result import ReplicaTotals, Result, Sample, ScaleEvent
from cluster.simulation.router import SimulatedRouter
from cluster.simulation.settings import Fault, Scaling, Settings
from cluster.simulation.signals import SignalMeter

NUM_SAMPLES = 240
MIN_SAMPLE_S = 1.0


def simulate(trace: Trace, settings: Settings) -> Result:
    """Serve a trace until each request has ended; the same seed gives the same result."""
    return Simulation(trace, settings).run()


class Events:
    """Calls in the order of their times; calls at the same time in the order of scheduling."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_scheduled = 0

    def schedule(self, time_s: float, call: Callable[..., None], *args: Any) -> None:
        """Schedule a call; a time in the past means now."""
        self._num_scheduled += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._num_scheduled, call, args))

    def run(self) -> None:
        heap = self._heap
        while heap:
            self.now_s, _, call, args = heapq.heappop(heap)
            call(*args)


class Simulation:
    """One run of a simulation."""

    def __init__(self, trace: Trace, settings: Settings) -> None:
        self.trace, self.settings = trace, settings
        self.events = Events()
        self._requests = [
            SimulatedRequest(spec, number % settings.routers)
            for number, spec in enumerate(trace.requests)
        ]
        self._num_left = len(self._requests)
        self._num_arrived = self._num_sampled = 0
        self._target = 0
        self._replicas: list[SimulatedReplica] = []
        self.by_id: dict[str, SimulatedReplica] = {}
        self._result = Result(settings.slo, self._requests)
        self._routers = [SimulatedRouter(number, self) for number in range(settings.routers)]
        scaling = settings.scaling
        startup_s = settings.engine.startup_s
        self._signals = SignalMeter(scaling, settings.slo, startup_s) if scaling else None

    def run(self) -> Result:
        """Run until all requests have ended; may be called once."""
        events, settings = self.events, self.settings
        self._target = settings.replicas
        for _ in range(settings.replicas):
            self._set_ready(self._start_replica())
        if self._requests:
            events.schedule(self._requests[0].spec.arrival_s, self._arrive, 0)
            events.schedule(settings.report_s, self._report_loads)
            self._sample(max(MIN_SAMPLE_S, self.trace.duration_s / NUM_SAMPLES))
            for fault in settings.faults:
                events.schedule(fault.at_s, self._inject_fault, fault)
            if settings.scaling is not None:
                events.schedule(settings.scaling.every_s, self._scale, settings.scaling)
        events.run()
        return self._finish()

    def cached_tokens(self, replica_id: str, view: RequestView) -> float:
        engine = self.by_id[replica_id].engine
        count = engine.cache.count_cached(view.prefix)
        while count < len(view.prefix) and view.prefix[count] in engine.pending_blocks:
            count += 1
        return view.prefix_tokens[count - 1] if count else 0.0

    # -- called by routers --

    def finish_request(self, request: SimulatedRequest, outcome: Outcome) -> None:
        assert request.outcome is None
        request.outcome = outcome
        request.view = request.placement = None  # saves memory, traces are long
        self._num_left -= 1

    # -- called by replicas --

    def first_token(self, request: SimulatedRequest) -> None:
        now_s = self.events.now_s
        request.first_token_s = now_s + self.settings.hop_s
        self._routers[request.router].first_token(request)
        if self._signals is not None:
            self._signals.add_ttft(now_s, request.first_token_s - request.spec.arrival_s)

    def request_done(self, request: SimulatedRequest, replica: SimulatedReplica) -> None:
        request.ended_s = self.events.now_s + self.settings.hop_s
        if self._signals is not None:
            self._signals.add_finished(request)
        self._routers[request.router].request_done(request)
        if replica.is_draining and not replica.requests:
            replica.end()

    def cache_changed(
        self, replica: SimulatedReplica, stored: list[int], evicted: list[int]
    ) -> None:
        """Report changed blocks to the routers, after the configured delay."""
        due_s = self.events.now_s + self.settings.event_delay_s
        self.events.schedule(due_s, self._report_cache, replica.id, stored, evicted)

    # -- recurring events --

    def _report_cache(self, replica_id: str, stored: list[int], evicted: list[int]) -> None:
        for router in self._routers:
            router.update_cache(replica_id, stored, evicted)

    def _arrive(self, number: int) -> None:
        request = self._requests[number]
        self._num_arrived += 1
        if number + 1 < len(self._requests):
            next_s = self._requests[number + 1].spec.arrival_s
            self.events.schedule(next_s, self._arrive, number + 1)
        if self._signals is not None:
            self._signals.add_arrival()
        self._routers[request.router].admit(request)

    def _report_loads(self) -> None:
        for replica in self._replicas:
            if replica.is_ready and not replica.is_hung:
                for router in self._routers:
                    router.update_load(replica)
        self._repeat(self.settings.report_s, self._report_loads)

    def _sample(self, every_s: float) -> None:
        live = self._live_replicas()
        num_ready = sum(replica.is_ready for replica in live)
        self._result.samples.append(
            Sample(
                at_s=self.events.now_s,
                arrivals=self._num_arrived - self._num_sampled,
                ready=num_ready,
                starting=len(live) - num_ready,
                in_flight=sum(len(replica.requests) for replica in self._replicas),
                queued=self._num_queued(),
            )
        )
        self._num_sampled = self._num_arrived
        self._repeat(every_s, self._sample, every_s)

    def _repeat(self, after_s: float, call: Callable[..., None], *args: object) -> None:
        if self._num_left:
            self.events.schedule(self.events.now_s + after_s, call, *args)

    def _num_queued(self) -> int:
        return sum(len(router.queue) for router in self._routers)

    # -- replicas --

    def _live_replicas(self) -> list[SimulatedReplica]:
        """Return the replicas that have not ended and do not drain."""
        now_s = self.events.now_s
        return [r for r in self._replicas if not r.is_draining and r.ended_s > now_s]

    def _start_replica(self) -> SimulatedReplica:
        replica = SimulatedReplica(len(self.by_id), self)
        self._replicas.append(replica)
        self.by_id[replica.id] = replica
        return replica

    def _set_ready(self, replica: SimulatedReplica) -> None:
        if replica.is_draining:
            return
        replica.ready_s = self.events.now_s
        for router in self._routers:
            router.add_replica(replica)

    def _scale(self, scaling: Scaling) -> None:
        assert self._signals is not None
        now_s = self.events.now_s
        ready = [replica for replica in self._live_replicas() if replica.is_ready]
        signals = self._signals.read(now_s, self._target, ready, self._num_queued())
        decision = scaling.policy(now_s, signals)
        if decision.target != self._target:
            event = ScaleEvent(
                now_s, self._target, decision.target, decision.cause, decision.reason
            )
            self._result.scale_events.append(event)
            self._target = decision.target
            self._match_target()
        self._repeat(scaling.every_s, self._scale, scaling)

    def _match_target(self) -> None:
        """Start or drain replicas until their number is the target."""
        live = self._live_replicas()
        ready_s = self.events.now_s + self.settings.engine.startup_s
        for _ in range(self._target - len(live)):
            self.events.schedule(ready_s, self._set_ready, self._start_replica())
        # As Serve does: first those that still start, then the newest.
        for replica in live[self._target :][::-1] if self._target < len(live) else ():
            self._retire(replica)
            if not replica.requests:
                replica.end()

    def _retire(self, replica: SimulatedReplica) -> None:
        replica.is_draining = True
        for router in self._routers:
            router.remove_replica(replica)

    # -- faults --

    def _inject_fault(self, fault: Fault) -> None:
        replica = self.by_id.get(f"r{fault.replica:04d}")
        if replica is None or replica.ended_s <= self.events.now_s:
            return
        if fault.kind == "slow":
            replica.engine.slowdown = fault.factor
        elif fault.kind == "hang":
            replica.is_hung = True
            detected_s = self.events.now_s + self.settings.detect_s
            self.events.schedule(detected_s, self._kill, replica)
        else:
            self._kill(replica)

    def _kill(self, replica: SimulatedReplica) -> None:
        """End a replica with its requests and start another one."""
        if replica.ended_s <= self.events.now_s:
            return
        lost = replica.end()
        self._retire(replica)
        for request in lost:
            self._routers[request.router].request_lost(request)
        self._match_target()

    def _finish(self) -> Result:
        ends_s = (request.ended_s or request.spec.arrival_s for request in self._requests)
        end_s = max(ends_s, default=0.0)
        result, totals = self._result, []
        for replica in self._replicas:
            until_s = min(replica.ended_s, end_s)
            result.itl_s.add_all(replica.engine.itl_s)
            totals.append(
                ReplicaTotals(
                    id=replica.id,
                    lived_s=max(0.0, until_s - replica.requested_s),
                    served_s=max(0.0, until_s - replica.ready_s),
                    in_flight_s=replica.in_flight_s,
                    work_s=replica.work_s,
                )
            )
        result.replicas = totals
        return result
