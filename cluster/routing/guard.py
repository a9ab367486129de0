"""Fleet guard: replicas that routing must not choose although their links are open.

Connects a fleet with the circuit breakers of its replicas, and keeps those on draining nodes free
for others. Policies see an avoided replica as unreachable; this module gives it trials, and uses it
for requests that no other replica can serve.
"""

from collections.abc import Callable, Collection, Set

from cluster.routing.breaker import BreakerLimits, Circuit, CircuitBreaker
from cluster.routing.fleet import REFRESH_S, Fleet
from cluster.routing.replica_state import Placement
from cluster.routing.table import Reach
from cluster.usage import Usage

SLOW_FLOOR_S = 0.1
"""Part of an answer's time that never counts as slow: scheduling noise of busy machines."""
OVERDUE_FLOOR_S = 1.0
"""The same for a request without any sign of life, in seconds."""


_OFF = BreakerLimits(max_share=0.0)


class FleetGuard:
    """Reachability of a fleet's replicas.

    Methods that take a replica's id raise KeyError if the replica is unknown.

    Args:
        fleet: The replicas; only the guard adds, removes and changes the reach of any.
        limits: Settings of the circuit breakers; None: circuits stay closed.
        on_change: Called after a circuit has changed.
    """

    def __init__(
        self,
        fleet: Fleet,
        limits: BreakerLimits | None,
        on_change: Callable[[Circuit], None] = lambda _: None,
    ) -> None:
        self._fleet = fleet
        self._breaker = CircuitBreaker(limits or _OFF)
        self._breaker.on_change = self._on_circuit
        self._on_change = on_change
        self._reaches: dict[str, Reach] = {}
        self._leaving: set[str] = set()
        # Requests by replica without a sign of life, and when that is overdue; oldest first.
        self._waiting: dict[str, dict[Placement, float]] = {}
        self._checked_s = 0.0

    def set_limits(self, limits: BreakerLimits | None) -> None:
        """Change the settings of the circuit breakers; see the class."""
        self._breaker.set_limits(limits or _OFF)

    def add(self, replica_id: str, capacity: int, reach: Reach = Reach.USUAL) -> None:
        """Add a replica; see ``Fleet.add``."""
        self._fleet.add(replica_id, capacity, Reach.NONE)
        self._reaches[replica_id] = Reach.NONE
        self._waiting[replica_id] = {}
        self._breaker.add(replica_id)
        self.set_reach(replica_id, reach)

    def remove(self, replica_id: str) -> None:
        self._breaker.remove(replica_id)
        self._fleet.remove(replica_id)
        self._leaving.discard(replica_id)
        del self._reaches[replica_id], self._waiting[replica_id]

    def set_reach(self, replica_id: str, reach: Reach) -> None:
        """Set whether a replica can be reached."""
        self._reaches[replica_id] = reach
        self._update(replica_id)

    def set_leaving(self, replica_ids: Set[str]) -> None:
        """Set the replicas that will leave soon; others get the requests if there are any."""
        changed = self._leaving ^ replica_ids
        self._leaving = set(replica_ids)
        for replica_id in changed & self._reaches.keys():
            self._update(replica_id)

    def circuit(self, replica_id: str) -> Circuit:
        return self._breaker.circuits[replica_id]

    # -- decisions --

    def advance(self, now_s: float) -> None:
        """Set the clock."""
        self._fleet.advance(now_s)
        if not 0.0 <= now_s - self._checked_s < REFRESH_S:
            self._checked_s = now_s
            self._check_waiting(now_s)

    def take_trial(self, hidden: Collection[str] = ()) -> str | None:
        """Return a replica that should get the next request as a trial, if any."""
        if not self._breaker.is_any_out:
            return None
        for replica_id in self._breaker.due_trials(self._fleet.now_s):
            if self._is_usable(replica_id, hidden) and replica_id not in self._leaving:
                return replica_id
        return None

    def last_resort(self, hidden: Collection[str] = ()) -> str | None:
        """Return an avoided replica with room if no other could ever serve the request."""
        if not self._breaker.is_any_out and not self._leaving:
            return None
        suitable = [each for each, reach in self._reaches.items() if reach and each not in hidden]
        if any(not self._is_avoided(each) for each in suitable):
            return None
        usable = [each for each in suitable if self._is_usable(each)]
        return min(usable, key=self._fleet.in_flight, default=None)

    # -- requests --

    def place(self, placement: Placement) -> None:
        """Note that a request was placed at a replica, which ``take_trial`` may have returned."""
        replica, fleet = placement.replica, self._fleet
        if self._breaker.is_any_out:
            circuit = self._breaker.circuits[replica.id]
            if circuit.state == "half_open" and circuit.on_trial is None:
                self._breaker.begin_trial(replica.id, placement, fleet.now_s)
        request = placement.request
        if request.streamed or not request.completion_tokens:
            patience_s = self._patience_s(placement)
            if patience_s is not None:
                self._waiting[replica.id][placement] = fleet.now_s + patience_s

    def record_first_token(self, placement: Placement) -> None:
        """Note that the first token of a request has arrived."""
        self._fleet.record_first_token(placement)
        self._stop_waiting(placement)

    def end(self, placement: Placement, usage: Usage | None) -> None:
        """Note that a request has ended; see ``Fleet.end``."""
        self._fleet.end(placement, usage)
        self._stop_waiting(placement)
        self._breaker.end_trial(placement.replica.id, placement)

    def record_answer(self, placement: Placement, usage: Usage | None) -> None:
        """Note that the replica gave an answer, before ``end``; its usage shows its speed.

        Without usage, the engine may not have worked at all, so the answer proves nothing.
        """
        if usage is not None and self._may_judge(placement):
            slowness = self._slowness(placement, usage)
            self._breaker.record_answer(placement.replica.id, slowness, self._fleet.now_s)

    def fail(self, placement: Placement, content: int | None) -> None:
        """Note that the replica failed a request, whose content has this hash."""
        if self._may_judge(placement):
            self._breaker.record_failure(placement.replica.id, content, self._fleet.now_s)

    def fail_link(self, replica_id: str) -> None:
        """Note that the link to a replica broke; its requests do not count one by one."""
        self._breaker.record_failure(replica_id, None, self._fleet.now_s)

    def is_trial(self, placement: Placement) -> bool:
        """Return True if the request is the trial of its replica."""
        circuit = self._breaker.circuits.get(placement.replica.id)
        return circuit is not None and circuit.on_trial is placement

    # -- internals --

    def _on_circuit(self, circuit: Circuit) -> None:
        if circuit.state == "half_open":  # its speed is unknown, and must not be held against it
            self._fleet.forget_speed(circuit.replica_id)
        self._update(circuit.replica_id)
        self._on_change(circuit)

    def _is_avoided(self, replica_id: str) -> bool:
        return replica_id in self._leaving or self._breaker.circuits[replica_id].is_out

    def _is_usable(self, replica_id: str, hidden: Collection[str] = ()) -> bool:
        return (
            self._reaches[replica_id] != Reach.NONE
            and replica_id not in hidden
            and self._fleet.has_room(replica_id)
        )

    def _update(self, replica_id: str) -> None:
        reach = self._reaches[replica_id]
        is_reachable = reach != Reach.NONE and replica_id not in self._leaving
        if is_reachable != self._breaker.circuits[replica_id].is_reachable:
            self._breaker.set_reachable(replica_id, is_reachable)
        avoided = self._is_avoided(replica_id)
        self._fleet.set_reach(replica_id, Reach.NONE if avoided else reach)

    def _may_judge(self, placement: Placement) -> bool:
        """Return True, once, if a request may be counted for or against its replica."""
        circuit = self._breaker.circuits.get(placement.replica.id)
        if circuit is None or placement.is_judged or placement.replica.row < 0:
            return False
        if circuit.is_out and circuit.on_trial is not placement:  # from before it opened
            return False
        placement.is_judged = True
        return True

    def _slowness(self, placement: Placement, usage: Usage) -> float | None:
        """Return the time of an answer as a multiple of what the peers take; None if unknown."""
        if placement.met_full_cache:
            return None
        took_s, peers_s = self._fleet.times_s(placement, usage)
        if not peers_s > 0.0:  # also NaN
            return None
        return max(0.0, took_s - SLOW_FLOOR_S) / peers_s

    def _patience_s(self, placement: Placement) -> float | None:
        """Return the time after which a request without a sign of life counts as slow."""
        expected_s = self._fleet.expected_first_s(placement)
        if not expected_s > 0.0:  # also NaN: the peers' speed is unknown
            return None
        factor = self._breaker.limits.slow_factor * self.circuit(placement.replica.id).usual
        return OVERDUE_FLOOR_S + factor * expected_s

    def _stop_waiting(self, placement: Placement) -> None:
        waiting = self._waiting.get(placement.replica.id)
        if waiting is not None:
            waiting.pop(placement, None)

    def _check_waiting(self, now_s: float) -> None:
        """Count the requests that are overdue, about once a second."""
        for replica_id, waiting in self._waiting.items():
            while waiting and next(iter(waiting.values())) <= now_s:
                placement = next(iter(waiting))
                del waiting[placement]
                if not placement.met_full_cache and self._may_judge(placement):
                    self._breaker.record_slow(replica_id, now_s)
