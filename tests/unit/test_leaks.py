"""Leaks are told from other growth, and one replica of a pool is replaced at a time."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.operations import LeaksConfig
from cluster.leaks.detector import MAX_SAMPLES, Growth, LeakDetector, MemorySample, theil_sen_slope
from cluster.leaks.lease import ReplacementLease

MIB = 1024**2
CONFIG = LeaksConfig(
    sample_s=10,
    window_s=600,
    settle_s=100,
    min_bytes_per_s=10_000,
    min_growth_bytes=16 * MIB,  # type: ignore[arg-type]
)


def detect(
    memory: Callable[[float], float],
    traffic: Callable[[float], float] = lambda at_s: 8,
    until_s: float = 1200,
) -> list[Growth]:
    detector = LeakDetector(CONFIG)
    times = [at_s * 10.0 for at_s in range(int(until_s / 10))]
    return [detector.add_sample(MemorySample(at_s, memory(at_s), traffic(at_s))) for at_s in times]


# -- slope -----------------------------------------------------------------------------------------


@given(
    slope=st.integers(-1000, 1000),
    start=st.integers(0, 10**9),
    wrong=st.dictionaries(st.integers(0, 39), st.integers(-(10**9), 10**9), max_size=8),
)
def test_a_fifth_of_the_samples_may_be_arbitrary(
    slope: int, start: int, wrong: dict[int, int]
) -> None:
    samples = [MemorySample(float(i), start + slope * i + wrong.get(i, 0), 0) for i in range(40)]
    found = theil_sen_slope(samples)
    assert found is not None
    assert found.bytes_per_s == pytest.approx(slope, abs=1e-6)


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=30), st.integers(1, 100))
def test_the_slope_is_independent_of_the_level_and_follows_the_sign(
    memory: list[int], step: int
) -> None:
    def slope(values: list[float]) -> float:
        found = theil_sen_slope([MemorySample(float(i * step), v, 0) for i, v in enumerate(values)])
        assert found is not None
        return found.bytes_per_s

    values = [float(value) for value in memory]
    lowest, highest = min(values), max(values)
    assert slope([v + 10**6 for v in values]) == pytest.approx(slope(values), abs=1e-3)
    assert slope([-v for v in values]) == pytest.approx(-slope(values), abs=1e-3)
    assert abs(slope(values)) <= (highest - lowest) / step


def test_many_samples_are_thinned_and_too_few_give_no_slope() -> None:
    assert theil_sen_slope([]) is None
    assert theil_sen_slope([MemorySample(0, 1, 1)]) is None
    many = [MemorySample(float(i), 3.0 * i, 0) for i in range(MAX_SAMPLES * 5 + 3)]
    found = theil_sen_slope(many)
    assert found is not None
    assert found.bytes_per_s == pytest.approx(3)
    assert found.rising == 1


# -- detector --------------------------------------------------------------------------------------


def test_steady_growth_is_a_leak_once_the_window_is_full() -> None:
    seen = detect(lambda at_s: 500 * MIB + 50_000 * at_s)
    first = next(i for i, growth in enumerate(seen) if growth.leaking)
    # Samples start after settle_s (100 s); the window of 600 s must be covered by 90 %.
    assert first * 10 == 640
    assert all(growth.leaking for growth in seen[first:])
    assert seen[-1].bytes_per_s == pytest.approx(50_000)


@pytest.mark.parametrize(
    ("name", "memory", "traffic"),
    [
        ("a level with noise", lambda t: 500 * MIB + 30 * MIB * random.Random(t).random(), None),
        ("slow growth", lambda t: 500 * MIB + 5_000 * t, None),
        ("a cache that fills at the start", lambda t: 500 * MIB + MIB * min(t, 90), None),
        ("one step", lambda t: (500 + 200 * (t > 700)) * MIB, None),
        ("a sawtooth", lambda t: (500 + (t % 200)) * MIB, None),
        ("a spike that stays for a while", lambda t: (500 + 900 * (700 < t < 800)) * MIB, None),
        ("memory that follows the traffic", lambda t: 500 * MIB + 50_000 * t, lambda t: t / 10),
    ],
)
def test_other_growth_is_not_a_leak(
    name: str, memory: Callable[[float], float], traffic: Callable[[float], float] | None
) -> None:
    seen = detect(memory, traffic or (lambda at_s: 8))
    assert not any(growth.leaking for growth in seen), name


def test_a_leak_is_found_under_varying_traffic() -> None:
    seen = detect(lambda t: 500 * MIB + 60_000 * t + MIB * (t % 70), lambda t: float(t % 70))
    assert seen[-1].leaking
    assert seen[-1].bytes_per_s == pytest.approx(60_000, rel=0.5)


def fill_cache(leak_bytes_per_s: Callable[[float], float], until_s: float) -> list[Growth]:
    """Return the growth, with the defaults, of an engine whose cache of 512 MiB fills."""
    detector, step_s = LeakDetector(LeaksConfig(), 512 * MIB), 15.0
    seen, leaked = [], 0.0
    for at_s in (number * step_s for number in range(int(until_s / step_s))):
        leaked += leak_bytes_per_s(at_s) * step_s
        resident = 900 * MIB + min(160 * 1024 * at_s, 512 * MIB) + leaked
        seen.append(detector.add_sample(MemorySample(at_s, resident, 8)))
    return seen


def test_a_cache_that_fills_within_the_allowance_is_not_a_leak() -> None:
    seen = fill_cache(lambda _: 0, until_s=8000)  # full after 3,277 s
    assert {growth.bytes_per_s for growth in seen} == {0}
    assert not any(growth.leaking for growth in seen)


@pytest.mark.parametrize("leak_from_s", [0, 5000])
def test_a_leak_is_found_beyond_the_allowance(leak_from_s: int) -> None:
    rate = 200 * 1024
    seen = fill_cache(lambda at_s: rate * (at_s > leak_from_s), until_s=12_000)
    first_s = next(i for i, growth in enumerate(seen) if growth.leaking) * 15
    # At most: the cache is full (3,277 s), the allowance is used up, and the window as well.
    assert first_s <= max(3277, leak_from_s) + 512 * MIB / rate + 1800
    assert seen[-1].bytes_per_s == pytest.approx(rate)


def test_memory_below_the_first_sample_is_no_part_of_the_allowance() -> None:
    detector = LeakDetector(CONFIG, 64 * MIB)
    for number in range(100):
        resident = (500 - 300 * (number > 10)) * MIB + 50_000.0 * 10 * number
        growth = detector.add_sample(MemorySample(10.0 * number, resident, 8))
    assert growth.leaking
    assert growth.bytes_per_s == pytest.approx(50_000)


# -- lease -----------------------------------------------------------------------------------------


class FakeStore:
    def __init__(self) -> None:
        self.keys: dict[str, str] = {}

    def put_if_absent(self, key: str, value: str) -> bool:
        return self.keys.setdefault(key, value) == value

    def has(self, key: str) -> bool:
        return key in self.keys


@given(st.lists(st.tuples(st.floats(0, 300), st.integers(0, 5)), max_size=60))
def test_two_replacements_of_a_pool_start_at_least_one_period_apart(
    asks: list[tuple[float, int]],
) -> None:
    store, now, started = FakeStore(), [0.0], list[float]()
    for number, (pause, replica) in enumerate(asks):
        now[0] += pause
        if ReplacementLease(store, "pool", 100.0, lambda: now[0]).acquire(f"{replica}-{number}"):
            started.append(now[0])
    assert all(later - earlier >= 100 for earlier, later in pairwise(started))
    if asks:
        assert started


def test_pools_are_independent_and_a_later_period_can_be_leased() -> None:
    store = FakeStore()
    assert ReplacementLease(store, "a", 100, lambda: 50).acquire("r1")
    assert ReplacementLease(store, "b", 100, lambda: 50).acquire("r2")
    assert not ReplacementLease(store, "a", 100, lambda: 60).acquire("r3")
    assert not ReplacementLease(store, "a", 100, lambda: 150).acquire("r3")
    assert ReplacementLease(store, "a", 100, lambda: 250).acquire("r3")


def test_a_renewed_lease_excludes_others_until_a_period_after_its_last_renewal() -> None:
    store, now = FakeStore(), [50.0]
    draining, other = (ReplacementLease(store, "a", 100, lambda: now[0]) for _ in range(2))
    assert draining.acquire("r1")
    for now[0] in (140.0, 240.0, 340.0):
        draining.renew("r1")
        assert not other.acquire("r2")
    now[0] = 490.0
    assert not other.acquire("r2")
    now[0] = 540.0
    assert other.acquire("r2")
