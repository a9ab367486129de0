"""The pool: arrivals, routers, replicas that start, leave, fail, and what is measured of them."""

from collections.abc import Callable

from cluster.routing import RequestView
from cluster.simulation.calls import Call, Outcome
from cluster.simulation.events import Events
from cluster.simulation.replica import Replica
from cluster.simulation.requests import Trace
from cluster.simulation.result import ReplicaTotals, Result, Sample, ScaleEvent
from cluster.simulation.router import Router
from cluster.simulation.settings import Fault, Scaling, Settings
from cluster.simulation.signals import Signals

NUM_SAMPLES = 240
MIN_SAMPLE_S = 1.0


def simulate(trace: Trace, settings: Settings) -> Result:
    """Serve a trace, until each of its requests has ended; the same seed gives the same."""
    return Simulation(trace, settings).run()


class Simulation:
    """One run; ``run`` it once."""

    def __init__(self, trace: Trace, settings: Settings) -> None:
        self._trace, self._settings = trace, settings
        self._events = Events()
        self._calls = [
            Call(request, number % settings.routers)
            for number, request in enumerate(trace.requests)
        ]
        self._num_left = len(self._calls)
        self._num_arrived = self._num_sampled = 0
        self._target = 0
        self._replicas: list[Replica] = []
        self._by_id: dict[str, Replica] = {}
        self._result = Result(settings.slo, self._calls)
        self._routers = [
            Router(number, settings, self._events, self.cached_tokens, trace.block_tokens, self)
            for number in range(settings.routers)
        ]
        scaling = settings.scaling
        startup_s = settings.engine.startup_s
        self._signals = Signals(scaling, settings.slo, startup_s) if scaling else None

    def run(self) -> Result:
        """Until nothing is left to happen."""
        events, settings = self._events, self._settings
        self._target = settings.replicas
        for _ in range(settings.replicas):
            self._ready(self._start())
        if self._calls:
            events.at(self._calls[0].request.arrival_s, self._arrive, 0)
            events.at(settings.report_s, self._report)
            self._sample(max(MIN_SAMPLE_S, self._trace.duration_s / NUM_SAMPLES))
            for fault in settings.faults:
                events.at(fault.at_s, self._befall, fault)
            if settings.scaling is not None:
                events.at(settings.scaling.every_s, self._scale, settings.scaling)
        events.run()
        return self._finish()

    def cached_tokens(self, replica_id: str, view: RequestView) -> float:
        """The truth: what a replica has of a prompt, or is computing."""
        engine = self._by_id[replica_id].engine
        held = engine.cache.count_cached(view.prefix)
        while held < len(view.prefix) and view.prefix[held] in engine.coming:
            held += 1
        return view.prefix_tokens[held - 1] if held else 0.0

    # What routers decide

    def give(self, call: Call, replica_id: str) -> bool:
        """Give a request to a replica."""
        return self._by_id[replica_id].give(call)

    def over(self, call: Call, outcome: Outcome) -> None:
        """A request has ended, once and for all."""
        assert call.outcome is None
        call.outcome = outcome
        call.view = call.placement = None  # a trace is long
        self._num_left -= 1

    # What happens at replicas

    def first_token(self, call: Call) -> None:
        """The first token is on its way to the client."""
        now_s = self._events.now_s
        call.first_s = now_s + self._settings.hop_s
        self._routers[call.router].first_token(call)
        if self._signals is not None:
            self._signals.first_token(now_s, call.first_s - call.request.arrival_s)

    def ended(self, call: Call, replica: Replica) -> None:
        """So is the last one."""
        call.ended_s = self._events.now_s + self._settings.hop_s
        if self._signals is not None:
            self._signals.ended(call)
        self._routers[call.router].ended(call)
        if replica.is_leaving and not replica.calls:
            replica.end()

    def cache_changed(self, replica: Replica, stored: list[int], removed: list[int]) -> None:
        """Routers hear of it a little later."""
        after_s = self._events.now_s + self._settings.event_delay_s
        self._events.at(after_s, self._tell, replica.id, stored, removed)

    def _tell(self, replica_id: str, stored: list[int], removed: list[int]) -> None:
        for router in self._routers:
            router.cache_changed(replica_id, stored, removed)

    # What happens by itself

    def _arrive(self, number: int) -> None:
        call = self._calls[number]
        self._num_arrived += 1
        if number + 1 < len(self._calls):
            self._events.at(self._calls[number + 1].request.arrival_s, self._arrive, number + 1)
        if self._signals is not None:
            self._signals.arrived()
        self._routers[call.router].admit(call)

    def _report(self) -> None:
        for replica in self._replicas:
            if replica.is_ready and not replica.is_hung:
                for router in self._routers:
                    router.report(replica)
        self._again(self._settings.report_s, self._report)

    def _sample(self, every_s: float) -> None:
        ready = [replica for replica in self._live() if replica.is_ready]
        self._result.samples.append(
            Sample(
                at_s=self._events.now_s,
                arrivals=self._num_arrived - self._num_sampled,
                ready=len(ready),
                starting=len(self._live()) - len(ready),
                ongoing=sum(len(replica.calls) for replica in self._replicas),
                queued=sum(len(router.queue) for router in self._routers),
            )
        )
        self._num_sampled = self._num_arrived
        self._again(every_s, self._sample, every_s)

    def _again(self, after_s: float, call: Callable[..., None], *args: object) -> None:
        if self._num_left:
            self._events.at(self._events.now_s + after_s, call, *args)

    # Replicas come and go

    def _live(self) -> list[Replica]:
        """Those that are to stay."""
        return [r for r in self._replicas if not r.is_leaving and r.ended_s > self._events.now_s]

    def _start(self) -> Replica:
        number, engine = len(self._by_id), self._settings.engine
        made = Replica(number, engine, self._trace.block_tokens, self._events, self)
        self._replicas.append(made)
        self._by_id[made.id] = made
        return made

    def _ready(self, replica: Replica) -> None:
        if replica.is_leaving:
            return
        replica.ready_s = self._events.now_s
        for router in self._routers:
            router.add(replica)

    def _scale(self, scaling: Scaling) -> None:
        assert self._signals is not None
        ready = [replica for replica in self._live() if replica.is_ready]
        queued = sum(len(router.queue) for router in self._routers)
        signals = self._signals.read(self._events.now_s, self._target, ready, queued)
        decision = scaling.policy(self._events.now_s, signals)
        target = decision.target
        if target != self._target:
            why = decision.cause, decision.reason
            event = ScaleEvent(self._events.now_s, self._target, target, *why)
            self._result.scale_events.append(event)
            self._target = target
            self._fill()
        self._again(scaling.every_s, self._scale, scaling)

    def _fill(self) -> None:
        """Start or end replicas until there are as many as there should be."""
        live = self._live()
        for _ in range(self._target - len(live)):
            started = self._start()
            self._events.at(
                self._events.now_s + self._settings.engine.startup_s, self._ready, started
            )
        # As Serve does: those that still start, then the newest.
        for replica in live[self._target :][::-1] if self._target < len(live) else ():
            self._leave(replica)

    def _leave(self, replica: Replica) -> None:
        replica.is_leaving = True
        for router in self._routers:
            router.remove(replica)
        if not replica.calls:
            replica.end()

    def _befall(self, fault: Fault) -> None:
        replica = self._by_id.get(f"r{fault.replica:04d}")
        if replica is None or replica.ended_s <= self._events.now_s:
            return
        if fault.kind == "slow":
            replica.engine.slowdown = fault.factor
        elif fault.kind == "hang":
            replica.is_hung = True
            self._events.at(self._events.now_s + self._settings.detect_s, self._die, replica)
        else:
            self._die(replica)

    def _die(self, replica: Replica) -> None:
        """Its requests are lost, and another one is started."""
        if replica.ended_s <= self._events.now_s:
            return
        lost = replica.end()
        replica.is_leaving = True
        for router in self._routers:
            router.remove(replica)
        for call in lost:
            self._routers[call.router].lost(call)
        self._fill()

    def _finish(self) -> Result:
        end_s = max((call.ended_s or call.request.arrival_s for call in self._calls), default=0.0)
        result = self._result
        totals = []
        for replica in self._replicas:
            until_s = min(replica.ended_s, end_s)
            result.itl_s.add_all(replica.engine.itl_s)
            totals.append(
                ReplicaTotals(
                    id=replica.id,
                    lived_s=max(0.0, until_s - replica.asked_s),
                    served_s=max(0.0, until_s - replica.ready_s),
                    ongoing_s=replica.ongoing_s,
                    work_s=replica.work_s,
                )
            )
        result.replicas = totals
        return result
