"""Circuit breakers take out a replica by its own record, and give it back after good trials."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.load import Load
from cluster.routing import Fleet, FleetGuard, Placement, RequestView
from cluster.routing.breaker import (
    CALM_S,
    HALF_LIFE_S,
    MAX_PAUSE_S,
    PAUSE_S,
    TRIAL_INTERVAL_S,
    TRIALS,
    BreakerLimits,
    Circuit,
    CircuitBreaker,
)
from cluster.usage import Usage

TOLERATED = 4
"""Bad requests of a new replica that do not open its circuit; one more does."""


class Pool:
    """Circuit breakers of replicas ``r0``, ``r1``, …, and a clock."""

    def __init__(self, num: int = 4, **limits: float) -> None:
        self.now_s = 1000.0
        self.breaker = CircuitBreaker(BreakerLimits(**limits))
        self.breaker.on_change = self._note
        self.changes: list[str] = []
        self._content = 0
        for number in range(num):
            self.breaker.add(f"r{number}")
            self.breaker.set_reachable(f"r{number}", True)

    def _note(self, circuit: Circuit) -> None:
        self.changes.append(circuit.state)

    def good(self, *replicas: str, times: int = 1, slowness: float | None = 1.0) -> None:
        for _ in range(times):
            for replica in replicas:
                self.breaker.record_answer(replica, slowness, self.now_s)

    def fail(self, replica: str, times: int = 1) -> None:
        for _ in range(times):
            self._content += 1
            self.breaker.record_failure(replica, self._content, self.now_s)

    def state(self, replica: str) -> str:
        return self.breaker.circuits[replica].state

    @property
    def num_out(self) -> int:
        return sum(circuit.is_out for circuit in self.breaker.circuits.values())

    def trial(
        self,
        replica: str,
        *,
        passes: bool,
        slow: bool = False,
        content: int | None = None,
        slowness: float = 1.0,
    ) -> None:
        """Give the replica its next trial."""
        self.now_s = max(self.now_s, self.breaker.circuits[replica].resumes_s)
        assert replica in self.breaker.due_trials(self.now_s)
        request = object()
        self.breaker.begin_trial(replica, request, self.now_s)
        assert replica not in self.breaker.due_trials(self.now_s + 100)
        if slow:
            self.breaker.record_slow(replica, self.now_s)
        elif passes:
            self.good(replica, slowness=slowness)
        elif content is not None:
            self.breaker.record_failure(replica, content, self.now_s)
        else:
            self.fail(replica)
        self.breaker.end_trial(replica, request)


def test_a_failing_replica_is_taken_out_and_restored() -> None:
    pool = Pool()
    pool.good("r0", "r1", "r2", "r3", times=20)
    pool.fail("r0", 10)
    assert pool.state("r0") == "open"
    assert pool.breaker.circuits["r0"].cause == "failing"
    assert pool.breaker.due_trials(pool.now_s + PAUSE_S - 0.1) == []
    for _ in range(TRIALS):
        pool.trial("r0", passes=True)
    assert pool.changes == ["open", "half_open", "closed"]
    pool.fail("r0", TOLERATED)
    assert pool.state("r0") == "closed"  # its record has begun again


def test_few_bad_requests_open_nothing() -> None:
    pool = Pool()
    pool.fail("r0", TOLERATED)
    assert pool.state("r0") == "closed"
    pool.fail("r0")
    assert pool.state("r0") == "open"


def test_old_failures_are_no_evidence() -> None:
    pool = Pool()
    for _ in range(20):
        pool.fail("r0", 1)
        pool.now_s += 300.0
    assert pool.changes == []


def test_a_slow_replica_is_taken_out() -> None:
    pool = Pool(slow_factor=4.0)
    pool.good("r1", "r2", "r3", times=20)
    pool.good("r0", times=30, slowness=3.9)
    assert pool.changes == []
    pool.good("r0", times=10, slowness=60.0)
    assert pool.state("r0") == "open"
    assert pool.breaker.circuits["r0"].cause == "slow"


def test_a_replica_that_was_always_slower_is_compared_with_its_past() -> None:
    """In a mixed pool, one replica has older hardware."""
    pool = Pool(slow_factor=4.0)
    pool.good("r0", times=500, slowness=3.0)
    pool.good("r0", times=50, slowness=8.0)
    assert pool.changes == []
    pool.good("r0", times=10, slowness=40.0)
    assert pool.state("r0") == "open"


def test_a_replica_that_stays_slower_returns() -> None:
    pool = Pool(slow_factor=4.0)
    pool.good("r1", "r2", "r3", times=20)
    pool.good("r0", times=10, slowness=5.0)
    assert pool.state("r0") == "open"
    for _ in range(20):
        if pool.state("r0") != "closed":
            pool.trial("r0", passes=True, slowness=5.0)
    pool.good("r0", times=50, slowness=5.0)
    assert pool.state("r0") == "closed"


def test_a_replica_that_returned_by_the_limit_was_not_calm() -> None:
    pool = Pool(4)
    pool.good("r1", "r2", "r3", times=20)
    pool.fail("r0", TOLERATED + 1)
    pool.trial("r0", passes=False)
    pool.now_s += CALM_S + 1
    pool.breaker.due_trials(pool.now_s)
    pool.breaker.set_limits(BreakerLimits(max_share=0.0))
    assert pool.state("r0") == "closed"
    pool.breaker.set_limits(BreakerLimits())
    pool.fail("r0", TOLERATED + 1)
    assert pool.breaker.circuits["r0"].resumes_s - pool.now_s == 4 * PAUSE_S


def test_one_very_slow_request_changes_nothing() -> None:
    pool = Pool()
    pool.good("r0", times=10)
    pool.good("r0", slowness=1e9)
    pool.good("r0", times=10)
    assert pool.changes == []
    assert pool.breaker.circuits["r0"].usual < 1.1


def test_what_all_replicas_do_opens_nothing() -> None:
    """The model fails, or all machines are slow."""
    pool = Pool()
    for _ in range(50):
        for replica in ("r0", "r1", "r2", "r3"):
            pool.fail(replica)
    assert pool.num_out == 0
    for _ in range(50):
        pool.good("r0", "r1", "r2", "r3", slowness=100.0)
    assert pool.num_out == 0


def test_a_request_that_is_repeated_counts_once() -> None:
    pool = Pool()
    pool.good("r1", "r2", "r3", times=20)
    for _ in range(100):
        pool.breaker.record_failure("r0", 7, pool.now_s)
    assert pool.changes == []


def test_a_repeated_request_counts_again_after_a_while() -> None:
    pool = Pool()
    pool.breaker.record_failure("r0", 7, pool.now_s)
    pool.now_s += HALF_LIFE_S + 1
    pool.breaker.record_failure("r1", 7, pool.now_s)  # forgives r0 nothing
    assert (pool.breaker.circuits["r0"].failed, pool.breaker.circuits["r1"].failed) == (1.0, 1.0)


def test_a_trial_with_a_request_that_failed_there_before_is_bad() -> None:
    pool = Pool()
    pool.good("r1", "r2", "r3", times=20)
    pool.fail("r0", TOLERATED + 1)
    for number in range(5):
        pool.trial("r0", passes=False, content=1)
        assert pool.state("r0") == "open", number


def test_only_good_trials_in_a_row_close_a_circuit() -> None:
    pool = Pool()
    pool.good("r1", "r2", "r3", times=20)
    pool.fail("r0", TOLERATED + 1)
    for _ in range(TRIALS - 1):
        pool.trial("r0", passes=True)
    pool.breaker.record_failure("r1", 7, pool.now_s + 1)
    pool.trial("r0", passes=False, content=7)  # the request's fault
    assert pool.state("r0") == "half_open"
    pool.trial("r0", passes=True)
    assert pool.state("r0") == "half_open"


def test_requests_that_fail_everywhere_count_nowhere() -> None:
    pool = Pool()
    pool.good("r2", "r3", times=20)
    for content in range(100):
        pool.breaker.record_failure("r0", content, pool.now_s)
        pool.breaker.record_failure("r1", content, pool.now_s)
    assert pool.changes == []


def test_the_pause_doubles_while_trials_fail_and_starts_over_after_a_calm_time() -> None:
    pool = Pool()
    pool.good("r1", "r2", "r3", times=20)
    pool.fail("r0", TOLERATED + 1)
    pauses_s = []
    for number in range(8):
        pauses_s.append(pool.breaker.circuits["r0"].resumes_s - pool.now_s)
        pool.trial("r0", passes=False, slow=number % 2 == 0)
    doubled = [min(MAX_PAUSE_S, PAUSE_S * 2**number) for number in range(8)]
    assert pauses_s == doubled
    for _ in range(TRIALS):
        pool.trial("r0", passes=True)
    assert pool.state("r0") == "closed"
    pool.fail("r0", TOLERATED + 1)  # it flaps, so it stays out for long
    assert pool.breaker.circuits["r0"].resumes_s - pool.now_s == MAX_PAUSE_S
    for _ in range(TRIALS):
        pool.trial("r0", passes=True)
    pool.now_s += CALM_S + 1
    pool.good("r1", "r2", "r3", times=20)
    pool.fail("r0", TOLERATED + 1)
    assert pool.breaker.circuits["r0"].resumes_s - pool.now_s == PAUSE_S


def test_a_trial_that_fails_elsewhere_too_says_nothing_about_the_replica() -> None:
    pool = Pool()
    pool.good("r1", "r2", "r3", times=20)
    pool.fail("r0", TOLERATED + 1)
    pool.trial("r0", passes=False)
    content = pool.breaker.circuits["r0"].opened_by
    assert pool.breaker.due_trials(pool.now_s) == []
    pool.breaker.record_failure("r1", content, pool.now_s)
    assert pool.breaker.due_trials(pool.now_s) == ["r0"]


def test_trials_are_spaced() -> None:
    pool = Pool()
    pool.fail("r0", TOLERATED + 1)
    pool.trial("r0", passes=True)
    assert pool.breaker.due_trials(pool.now_s + TRIAL_INTERVAL_S * 0.9) == []
    assert pool.breaker.due_trials(pool.now_s + TRIAL_INTERVAL_S) == ["r0"]


class Guarded:
    """Four replicas that decode 100 tokens/s, and a clock; ``r0`` gets the tests' requests."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.guard = FleetGuard(self.fleet, BreakerLimits())
        self.now_s = 100.0
        for number in range(4):
            self.guard.add(f"r{number}", 8)
        self.teach()

    def teach(self) -> None:
        for replica in [f"r{number}" for number in range(4)] * 20:
            self.answer(self.place(replica), 1.0)

    def place(self, replica: str = "r0") -> Placement:
        placement = self.fleet.place(replica, RequestView(100.0, 100.0, streamed=True))
        self.guard.place(placement)
        return placement

    def answer(self, placement: Placement, after_s: float) -> None:
        self.wait(0.01)
        self.guard.record_first_token(placement)
        self.wait(after_s)
        self.guard.record_answer(placement, Usage(100, 0, 100))
        self.guard.end(placement, Usage(100, 0, 100))

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.guard.advance(self.now_s)

    def report(self, kv_cache_usage: float) -> None:
        self.fleet.update_load("r0", Load(1, 1, kv_cache_usage))

    @property
    def slow(self) -> float:
        return self.guard.circuit("r0").slow


@pytest.mark.parametrize("is_full", [False, True])
def test_waiting_for_a_full_kv_cache_is_no_evidence(is_full: bool) -> None:
    pool = Guarded()
    waiting, running = pool.place(), pool.place()
    pool.guard.record_first_token(running)
    if is_full:
        pool.report(0.99)
    pool.wait(10.0)
    assert bool(pool.slow) != is_full, "no sign of life"
    pool.report(0.5)
    before = pool.slow
    pool.answer(running, 1.0)
    assert (pool.slow > before) != is_full, "an answer that others may have displaced"
    pool.guard.end(waiting, None)
    pool.teach()
    before = pool.slow
    pool.answer(pool.place(), 10.0)
    assert pool.slow > before, "the cache was not full"


@pytest.mark.parametrize(
    ("num", "max_share", "expected"),
    [(1, 0.5, 0), (2, 0.5, 1), (3, 0.5, 1), (10, 0.2, 2), (4, 0, 0)],
)
def test_the_last_replicas_stay(num: int, max_share: float, expected: int) -> None:
    pool = Pool(num, max_share=max_share)
    for number in range(num):
        others = [f"r{other}" for other in range(num) if other != number]
        pool.good(*others, times=20)
        pool.fail(f"r{number}", 20)
    assert pool.num_out == expected


def test_replicas_return_if_too_few_are_left() -> None:
    pool = Pool(4, max_share=0.5)
    pool.good("r2", "r3", times=20)
    pool.fail("r0", TOLERATED + 1)
    pool.fail("r1", TOLERATED + 1)
    assert pool.num_out == 2
    pool.breaker.remove("r2")
    assert pool.num_out == 1
    pool.breaker.set_reachable("r3", False)
    assert pool.num_out == 1  # one of two
    pool.breaker.set_reachable("r1", False)
    assert pool.state("r0") == "closed"


def test_a_lower_limit_returns_replicas() -> None:
    pool = Pool(4, max_share=0.5)
    pool.good("r2", "r3", times=20)
    pool.fail("r0", TOLERATED + 1)
    pool.fail("r1", TOLERATED + 1)
    pool.breaker.set_limits(BreakerLimits(max_share=0.25))
    assert (pool.state("r0"), pool.state("r1")) == ("closed", "open")
    pool.breaker.set_limits(BreakerLimits(max_share=0.0))
    assert pool.num_out == 0


events = st.lists(
    st.tuples(
        st.sampled_from(["good", "slow", "fail", "same", "leave", "return", "trial"]),
        st.integers(0, 4),
        st.floats(0.0, 20.0),
    ),
    max_size=300,
)


@given(events, st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_in_any_history_the_limit_holds_and_nothing_flaps(
    history: list[tuple[str, int, float]], max_share: float
) -> None:
    pool = Pool(5, max_share=max_share)
    reachable = {f"r{number}" for number in range(5)}
    opened_s: dict[str, float] = {}
    for kind, number, elapsed_s in history:
        pool.now_s += elapsed_s
        replica = f"r{number}"
        before = {name: circuit.state for name, circuit in pool.breaker.circuits.items()}
        if kind == "good":
            pool.good(replica)
        elif kind == "slow":
            pool.good(replica, slowness=100.0)
        elif kind == "fail":
            pool.fail(replica)
        elif kind == "same":
            pool.breaker.record_failure(replica, 0, pool.now_s)
            opened_s.clear()  # a forgiven trial is repeated at once
        elif kind == "trial":
            for due in pool.breaker.due_trials(pool.now_s):
                pool.breaker.begin_trial(due, object(), pool.now_s)
        else:
            pool.breaker.set_reachable(replica, kind == "return")
            (reachable.add if kind == "return" else reachable.discard)(replica)
        out = {name for name, each in pool.breaker.circuits.items() if each.is_out}
        assert len(out & reachable) <= max_share * len(reachable)
        for name, circuit in pool.breaker.circuits.items():
            if circuit.state == "open" and before[name] != "open":
                opened_s[name] = pool.now_s
            if circuit.state == "half_open" and before[name] == "open":
                assert pool.now_s - opened_s.get(name, -PAUSE_S) >= PAUSE_S
            assert not (kind == "good" and before[name] == "closed" and circuit.is_out)
