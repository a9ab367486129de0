"""Circuit breakers of one pool's replicas: a replica whose recent requests go bad gets no new ones.

A request is bad if the replica failed it or took far longer than its peers would. A circuit is
*closed* while the replica gets its share. It *opens* if the replica's share of bad requests exceeds
that of its peers by ``MIN_EXCESS``. After a pause it is *half-open*: the replica gets single
requests as trials. If they go well it closes; if one goes bad it opens again, for twice as long.

Pure: times are passed in, and each event costs O(1). Only this router's requests count.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

CircuitState = Literal["closed", "open", "half_open"]
CircuitCause = Literal["failing", "slow"]

DECAY = 0.9
"""Share of a record that is kept at each request: about the last 10 count."""
HALF_LIFE_S = 60.0
"""Time after which a record counts half, so that an old failure is no evidence."""
MIN_BAD = 4.0
"""Decayed number of bad requests that opens a circuit: at least 5 requests."""
MIN_EXCESS = 0.5
"""Share of bad requests above that of the peers that opens a circuit. If every replica fails, the
cause is the requests or the model, and no circuit opens."""
PAUSE_S = 5.0
"""Pause before the first trial, in seconds; it doubles each time the circuit opens again."""
MAX_PAUSE_S = 300.0
CALM_S = 600.0
"""Time in seconds for which a circuit must have been closed for the pause to start over."""
TRIALS = 3
"""Good trials in a row that close a circuit."""
TRIAL_INTERVAL_S = 0.5
"""Shortest time between the starts of two trials of a replica, in seconds."""
USUAL_WEIGHT = 0.01
"""Weight of the newest request in a replica's usual slowness."""
MAX_FAILED = 256
"""Contents of failed requests that are remembered."""


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """Settings of the circuit breakers of one pool."""

    max_share: float = 0.5
    """Share of the reachable replicas that may be out at a time, 0 to 1; rounded down."""
    slow_factor: float = 4.0
    """Multiple of the time that its peers take, and that it usually takes, from which an answer of
    a replica is slow."""


@dataclass(eq=False, slots=True)
class Circuit:
    """Circuit of one replica."""

    replica_id: str
    state: CircuitState = "closed"
    cause: CircuitCause = "failing"
    """Cause of the last opening."""
    usual: float = 1.0
    """Usual time of its answers, as a multiple of its peers'; at least 1."""
    is_reachable: bool = False
    on_trial: object | None = None
    """The request that is the trial of a half-open circuit."""
    good: float = 0.0
    failed: float = 0.0
    slow: float = 0.0
    """Decayed numbers of good, failed and slow requests."""
    recorded_s: float = 0.0
    resumes_s: float = 0.0
    """Time of the next trial, once the circuit is open or half-open."""
    closed_s: float = -CALM_S
    num_openings: int = 0
    """Openings since the circuit was last closed for ``CALM_S``."""
    num_passed: int = 0
    """Good trials since the circuit became half-open."""
    opened_by: int | None = None
    """Content of the trial that opened the circuit again."""

    @property
    def is_out(self) -> bool:
        """True if the replica gets no requests but trials."""
        return self.state != "closed"

    @property
    def bad(self) -> float:
        return self.failed + self.slow

    @property
    def total(self) -> float:
        return self.good + self.bad


class CircuitBreaker:
    """Circuits of all replicas of a pool; ``on_change`` is called after a state has changed.

    Methods that take a replica's id raise KeyError if the replica is unknown.
    """

    def __init__(self, limits: BreakerLimits) -> None:
        self.limits = limits
        self.circuits: dict[str, Circuit] = {}
        """Circuits by replica; read-only."""
        self.on_change: Callable[[Circuit], None] = lambda _: None
        self._out: dict[str, Circuit] = {}  # in the order of their openings
        self._num_reachable = 0
        self._now_s = (
            0.0  # of the last opening, or of a later request while a circuit is not closed
        )
        self._bad = self._total = 0.0  # sums over the closed circuits
        # Replica and time of the failure by content; no replica if it was forgiven.
        self._failed_at: OrderedDict[int, tuple[str, float]] = OrderedDict()

    # -- membership --

    def add(self, replica_id: str) -> None:
        self.circuits[replica_id] = Circuit(replica_id)

    def remove(self, replica_id: str) -> None:
        circuit = self.circuits[replica_id]
        self.set_reachable(replica_id, False)
        self._forget_record(circuit)
        self._out.pop(replica_id, None)
        del self.circuits[replica_id]

    def set_reachable(self, replica_id: str, is_reachable: bool) -> None:
        """Note whether a replica could be used; those that cannot do not count for the limit."""
        circuit = self.circuits[replica_id]
        self._num_reachable += is_reachable - circuit.is_reachable
        circuit.is_reachable = is_reachable
        self._respect_limit()

    def set_limits(self, limits: BreakerLimits) -> None:
        """Change the settings; replicas return if more are out than allowed now."""
        self.limits = limits
        self._respect_limit()

    # -- results of requests --

    def record_answer(self, replica_id: str, slowness: float | None, now_s: float) -> None:
        """Record an answer.

        Args:
            replica_id: The replica that answered.
            slowness: Time of the answer as a multiple of what the peers take; None if unknown.
            now_s: Present time in seconds, as for all methods.
        """
        circuit = self.circuits[replica_id]
        if slowness is None:
            self._record_good(circuit, now_s)
            return
        limit = self.limits.slow_factor * circuit.usual
        if slowness > limit:
            self.record_slow(replica_id, now_s)
        else:
            self._record_good(circuit, now_s)
        # Trials teach it, too: a replica that has become slower for good returns in time.
        excess = min(slowness, limit) - circuit.usual
        circuit.usual = max(1.0, circuit.usual + USUAL_WEIGHT * excess)

    def record_slow(self, replica_id: str, now_s: float) -> None:
        """Record a request that took too long; it may not have ended."""
        circuit = self.circuits[replica_id]
        if circuit.state == "half_open":
            self._open(circuit, "slow", now_s)
        elif circuit.state == "closed":
            self._add(circuit, 0.0, 0.0, 1.0, now_s)
            self._open_if_bad(circuit, now_s)

    def record_failure(self, replica_id: str, content: int | None, now_s: float) -> None:
        """Record a request that the replica failed.

        Equal requests count once in ``HALF_LIFE_S``, unless they are trials, and not at all if they
        fail at two replicas.

        Args:
            replica_id: The replica that failed.
            content: Hash of the request; None if the failure does not depend on it.
            now_s: Present time in seconds.
        """
        if content is not None and self._is_contents_fault(content, replica_id, now_s):
            self.circuits[replica_id].num_passed = 0  # of trials in a row
            return
        circuit = self.circuits[replica_id]
        if circuit.state == "half_open":
            self._open(circuit, "failing", now_s)
            circuit.opened_by = content
        elif circuit.state == "closed":
            self._add(circuit, 0.0, 1.0, 0.0, now_s)
            self._open_if_bad(circuit, now_s)

    # -- trials --

    @property
    def is_any_out(self) -> bool:
        """True if any replica gets no requests but trials."""
        return bool(self._out)

    def due_trials(self, now_s: float) -> list[str]:
        """Return the replicas that should get a trial now; circuits become half-open."""
        self._now_s = now_s
        due = []
        for circuit in self._out.values():
            if now_s < circuit.resumes_s or not circuit.is_reachable:
                continue
            if circuit.state == "open":
                circuit.state, circuit.num_passed = "half_open", 0
                self.on_change(circuit)
            if circuit.on_trial is None:
                due.append(circuit.replica_id)
        return due

    def begin_trial(self, replica_id: str, request: object, now_s: float) -> None:
        circuit = self.circuits[replica_id]
        circuit.on_trial, circuit.resumes_s = request, now_s + TRIAL_INTERVAL_S

    def end_trial(self, replica_id: str, request: object) -> None:
        """Note that a request has ended; has no effect unless it is the trial."""
        circuit = self.circuits.get(replica_id)
        if circuit is not None and circuit.on_trial is request:
            circuit.on_trial = None

    # -- internals --

    def _respect_limit(self) -> None:
        while self._num_out() > self._max_out():
            first = next(each for each in self._out.values() if each.is_reachable)
            self._close(first, self._now_s)

    def _num_out(self) -> int:
        return sum(circuit.is_reachable for circuit in self._out.values())

    def _max_out(self) -> int:
        return int(self.limits.max_share * self._num_reachable)

    def _record_good(self, circuit: Circuit, now_s: float) -> None:
        if circuit.state == "closed":
            self._add(circuit, 1.0, 0.0, 0.0, now_s)
        elif circuit.state == "half_open":
            circuit.num_passed += 1
            if circuit.num_passed >= TRIALS:
                self._close(circuit, now_s)

    def _add(self, circuit: Circuit, good: float, failed: float, slow: float, now_s: float) -> None:
        age_s = max(0.0, now_s - circuit.recorded_s)
        circuit.recorded_s = now_s
        keep = DECAY * 0.5 ** (age_s / HALF_LIFE_S)
        self._bad -= circuit.bad
        self._total -= circuit.total
        circuit.good = circuit.good * keep + good
        circuit.failed = circuit.failed * keep + failed
        circuit.slow = circuit.slow * keep + slow
        self._bad += circuit.bad
        self._total += circuit.total

    def _open_if_bad(self, circuit: Circuit, now_s: float) -> None:
        if circuit.bad < MIN_BAD:
            return
        # One good request is assumed, which matters if the peers have hardly a record.
        peers_share = (self._bad - circuit.bad) / (self._total - circuit.total + 1.0)
        if circuit.bad / circuit.total - peers_share < MIN_EXCESS:
            return
        if circuit.is_reachable and self._num_out() < self._max_out():
            self._open(circuit, "failing" if circuit.failed >= circuit.slow else "slow", now_s)

    def _open(self, circuit: Circuit, cause: CircuitCause, now_s: float) -> None:
        if circuit.state == "closed" and now_s - circuit.closed_s > CALM_S:
            circuit.num_openings = 0
        pause_s = min(MAX_PAUSE_S, PAUSE_S * 2.0 ** min(circuit.num_openings, 10))
        circuit.num_openings += 1
        circuit.state, circuit.cause, circuit.opened_by = "open", cause, None
        self._now_s = now_s
        circuit.resumes_s, circuit.on_trial = now_s + pause_s, None
        self._forget_record(circuit)
        self._out[circuit.replica_id] = circuit
        self.on_change(circuit)

    def _close(self, circuit: Circuit, now_s: float) -> None:
        circuit.state, circuit.on_trial, circuit.closed_s = "closed", None, now_s
        self._out.pop(circuit.replica_id, None)
        self.on_change(circuit)

    def _forget_record(self, circuit: Circuit) -> None:
        self._bad -= circuit.bad
        self._total -= circuit.total
        circuit.good = circuit.failed = circuit.slow = 0.0

    def _is_contents_fault(self, content: int, replica_id: str, now_s: float) -> bool:
        """Return True if a failure does not count, and forgive it to the other replica."""
        earlier, failed_s = self._failed_at.get(content, ("", -HALF_LIFE_S))
        if now_s - failed_s >= HALF_LIFE_S:
            self._failed_at[content] = replica_id, now_s
            self._failed_at.move_to_end(content)
            if len(self._failed_at) > MAX_FAILED:
                self._failed_at.popitem(last=False)
            return False
        self._failed_at.move_to_end(content)
        if earlier == replica_id:
            return self.circuits[replica_id].state != "half_open"
        other = self.circuits.get(earlier)
        if other is not None:
            self._failed_at[content] = "", failed_s  # forgiven once
            if other.state == "closed":
                self._bad -= min(1.0, other.failed)
                self._total -= min(1.0, other.failed)
                other.failed -= min(1.0, other.failed)
            elif other.state == "open" and other.opened_by == content:
                other.resumes_s = now_s
                other.num_openings -= 1
        return True
