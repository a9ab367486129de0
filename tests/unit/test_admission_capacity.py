import random

import pytest

from cluster.admission.capacity import ADJUST_S, BEGIN_S, KV_HIGH, PoolCapacity
from cluster.load import Load

WORK = 100.0


class Engine:
    """Runs ``at_a_time`` requests, each for a second; the others wait."""

    def __init__(self, at_a_time: int, kv_tokens: float = 1e9) -> None:
        self.at_a_time, self.kv_tokens = at_a_time, kv_tokens
        self.capacity = PoolCapacity(0.25)
        self.now_s = 0.0
        self._waiting: list[float] = []
        self._running: list[tuple[float, float]] = []

    def tick(self, tick_s: float = 0.05) -> None:
        while self.capacity.has_room and self.capacity.in_flight < 256:
            self.capacity.add_request(WORK)
            self._waiting.append(self.now_s)
        while self._waiting and len(self._running) < self.at_a_time:
            self._running.append((self._waiting.pop(0), self.now_s))
        self.now_s += tick_s
        for given, started in [r for r in self._running if self.now_s - r[1] >= 1.0]:
            self._running.remove((given, started))
            self.capacity.remove_request(WORK, WORK, self.now_s - given)
        usage = min(1.0, len(self._running) * WORK / self.kv_tokens)
        load = Load(len(self._running), len(self._waiting), usage)
        self.capacity.observe_loads([load], self.now_s)


def test_replicas_get_what_they_run_and_a_small_queue() -> None:
    engine = Engine(16)
    for _ in range(2000):
        engine.tick()
    # At least what runs. At most 1.25 times that may wait, the limit overshoots by up to a tenth
    # per adjustment, and all 16 end in the same tick, so 16 more are on their way.
    assert 16 <= engine.capacity.in_flight <= 16 * 1.6 + 16
    assert engine.capacity.drain_tokens_per_s() == pytest.approx(16 * WORK, rel=0.2)


def test_the_limit_rises_when_the_pool_grows() -> None:
    engine = Engine(8)
    for _ in range(1000):
        engine.tick()
    engine.at_a_time = 64
    for _ in range(1000):
        engine.tick()
    assert engine.capacity.in_flight >= 64


def test_a_full_kv_cache_lowers_the_limit() -> None:
    capacity = PoolCapacity(0.25)
    for _ in range(10):
        capacity.add_request(WORK)
    for step in range(5):
        capacity.observe_loads([Load(10, 0, 0.99)], step * ADJUST_S)
    assert capacity.limit_tokens == pytest.approx(10 * WORK * KV_HIGH / 0.99)
    assert not capacity.has_room


def test_requests_are_admitted_while_there_is_room_and_may_overdraw_it() -> None:
    capacity = PoolCapacity(0.25)
    capacity.limit_tokens = 1.0
    assert capacity.has_room
    capacity.add_request(0.9)
    assert capacity.has_room
    capacity.add_request(1e9)
    assert not capacity.has_room


def test_an_intermittent_queue_does_not_lower_the_limit() -> None:
    capacity = PoolCapacity(0.25)
    for _ in range(100):
        capacity.add_request(WORK)
    for step in range(200):
        capacity.observe_loads([Load(50, 50 * (step % 2))], step * 0.05)
    assert capacity.limit_tokens == float("inf")


def test_a_standing_queue_lowers_the_limit_despite_single_empty_samples() -> None:
    capacity = PoolCapacity(0.25)
    for _ in range(100):
        capacity.add_request(WORK)
    for step in range(200):
        capacity.observe_loads([Load(50, 50 * (step % 5 > 0))], step * 0.05)
    assert capacity.limit_tokens == pytest.approx(100 * WORK * (50 + 12.5) / 100)


def test_a_burst_after_a_pause_does_not_lower_the_limit() -> None:
    capacity = PoolCapacity(0.25)
    capacity.observe_loads([Load()], 0.0)
    capacity.observe_loads([Load()], 1.0)
    for _ in range(32):
        capacity.add_request(WORK)
    for step in range(3):  # they arrived, and the engine has not begun its next step
        capacity.observe_loads([Load(1, 31)], 9.9 + step * 0.05)
    for step in range(20):
        capacity.observe_loads([Load(32)], 10.05 + step * 0.05)
    assert capacity.limit_tokens == float("inf")


def limit_after_burst(num: int, step_s: float, begun: int, slots: int, end_s: float) -> float:
    """Return the limit after a burst; each step begins ``begun`` requests, which do not end."""
    capacity = PoolCapacity(0.25)
    for _ in range(num):
        capacity.add_request(WORK)
    for tick in range(int(end_s / 0.05)):
        running = min(num, slots, begun * int(tick * 0.05 / step_s))
        capacity.observe_loads([Load(running, num - running, slots=slots)], tick * 0.05)
    return capacity.limit_tokens


@pytest.mark.parametrize(("step_s", "begun"), [(0.1, 1), (0.35, 4), (1.25, 16)])
def test_prompts_that_an_engine_is_computing_do_not_lower_the_limit(
    step_s: float, begun: int
) -> None:
    assert limit_after_burst(32, step_s, begun, slots=128, end_s=20) == float("inf")


def test_requests_that_an_engine_does_not_begin_lower_the_limit() -> None:
    assert limit_after_burst(32, 100, 1, slots=128, end_s=BEGIN_S) == float("inf")
    assert limit_after_burst(32, 100, 1, slots=128, end_s=BEGIN_S + 2 * ADJUST_S) < 32 * WORK


@pytest.mark.parametrize(("num", "begun", "slots"), [(32, 8, 8), (256, 1, 128)])
def test_full_slots_and_many_prompts_lower_the_limit_at_once(
    num: int, begun: int, slots: int
) -> None:
    assert limit_after_burst(num, 0.1, begun, slots, end_s=3 * ADJUST_S) < num * WORK / 2


def test_the_end_of_load_does_not_lower_the_limit() -> None:
    capacity = PoolCapacity(0.25)
    for _ in range(40):
        capacity.add_request(WORK)
    for step in range(6):
        capacity.observe_loads([Load(32, 8)], step * 0.05)
    for step in range(6, 40):
        if capacity.in_flight:
            for _ in range(10):
                capacity.remove_request(WORK, WORK, 1.0)
        capacity.observe_loads([Load(min(32, capacity.in_flight))], step * 0.05)
    assert capacity.limit_tokens == float("inf")


def test_waiting_inside_an_engine_does_not_change_the_drain_rate() -> None:
    capacity, now_s = PoolCapacity(0.25), 0.0
    for _ in range(32):
        capacity.add_request(WORK)
    for _ in range(200):  # 32 at a time, one second each
        now_s += 1 / 32
        capacity.remove_request(WORK, WORK, 1.0)
        capacity.add_request(WORK)
        capacity.observe_loads([Load(32)], now_s)
    assert capacity.drain_tokens_per_s() == pytest.approx(32 * WORK)
    for _ in range(32):
        capacity.add_request(WORK)
    for step in range(20):
        capacity.observe_loads([Load(32, 32)], now_s + step * 0.05)
    assert capacity.drain_tokens_per_s() == pytest.approx(32 * WORK, rel=0.02)
    for _ in range(500):  # each takes two seconds now, one of them in the engine's queue
        now_s += 1 / 32
        capacity.remove_request(WORK, WORK, 2.0)
        capacity.add_request(WORK)
        capacity.observe_loads([Load(32, 32)], now_s + 1)
    assert capacity.drain_tokens_per_s() == pytest.approx(32 * WORK, rel=0.02)


def test_missing_load_reports_change_nothing() -> None:
    capacity = PoolCapacity(0.25)
    for step in range(10):
        capacity.observe_loads([], float(step))
    assert capacity.has_room


@pytest.mark.parametrize("odd", [Load(4, 10_000), Load(4, 0, 2.0), Load(16, 16)])
def test_one_odd_replica_does_not_hold_up_the_others(odd: Load) -> None:
    capacity = PoolCapacity(0.25)
    for _ in range(40):
        capacity.add_request(WORK)
    for step in range(100):
        capacity.observe_loads([Load(16, 1, 0.5), odd, Load(16, 2, 0.4)], step * 0.05)
    assert capacity.limit_tokens == float("inf")
    for step in range(100, 200):
        capacity.observe_loads([Load(16, 20), odd, Load(16, 12)], step * 0.05)
    assert capacity.limit_tokens < 40 * WORK


def test_clock_jumps_and_random_reports_leave_a_usable_limit() -> None:
    draw = random.Random(1)
    capacity = PoolCapacity(0.25)
    for _ in range(20):
        capacity.add_request(WORK)
    for _ in range(1000):
        load = Load(draw.randrange(300), draw.randrange(10_000), draw.random() * 2)
        capacity.observe_loads([load], draw.uniform(-1e6, 1e6))
    assert capacity.limit_tokens >= WORK
    for _ in range(20):
        capacity.remove_request(WORK, WORK, draw.uniform(-1, 1))
    assert capacity.in_flight_tokens == 0
    assert capacity.has_room


def test_failed_requests_are_not_learned_from() -> None:
    capacity = PoolCapacity(0.25)
    capacity.add_request(WORK)
    capacity.remove_request(WORK, 0.0, 5.0)
    capacity.add_request(WORK)
    assert capacity.drain_tokens_per_s() is None
    assert capacity.average_request_s(WORK) == 0
    capacity.remove_request(WORK, WORK, 2.0)
    assert capacity.drain_tokens_per_s() is None  # none is in flight
    assert capacity.average_request_s(10 * WORK) == pytest.approx(2.0)
    assert capacity.average_request_s(WORK / 10) == pytest.approx(0.2)


def test_the_best_latency_is_remembered_for_a_limited_time() -> None:
    capacity = PoolCapacity(0.25)
    for step in range(400):
        capacity.add_request(WORK)
        capacity.remove_request(WORK, WORK, 1.0 if step < 5 else 10.0)
        capacity.observe_loads([Load(1)], step * ADJUST_S)
        if step == 60:
            assert capacity.best_request_s(WORK) == pytest.approx(1.0)
            assert capacity.average_request_s(WORK) > 5
    assert capacity.best_request_s(WORK) == pytest.approx(10.0, rel=0.1)
