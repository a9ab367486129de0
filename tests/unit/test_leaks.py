"""Which memory is a leak, and that one replica of a pool goes at a time."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.operations import LeaksConfig
from cluster.leaks.detector import Growth, LeakDetector
from cluster.leaks.slope import MAX_POINTS, Point, theil_sen
from cluster.leaks.turns import Turns

MIB = 1024**2
CONFIG = LeaksConfig(
    sample_s=10,
    window_s=600,
    settle_s=100,
    min_bytes_per_s=10_000,
    min_growth_bytes=16 * MIB,  # type: ignore[arg-type]
)


def watch(
    memory: Callable[[float], float],
    traffic: Callable[[float], float] = lambda at_s: 8,
    until_s: float = 1200,
) -> list[Growth]:
    detector = LeakDetector(CONFIG)
    times = [at_s * 10.0 for at_s in range(int(until_s / 10))]
    return [detector.sample(at_s, memory(at_s), traffic(at_s)) for at_s in times]


# -- slope -----------------------------------------------------------------------------------------


@given(
    slope=st.integers(-1000, 1000),
    start=st.integers(0, 10**9),
    wrong=st.dictionaries(st.integers(0, 39), st.integers(-(10**9), 10**9), max_size=8),
)
def test_a_fifth_of_the_points_may_be_anything(
    slope: int, start: int, wrong: dict[int, int]
) -> None:
    points = [Point(float(i), start + slope * i + wrong.get(i, 0), 0) for i in range(40)]
    found = theil_sen(points)
    assert found is not None
    exact = sum(i not in wrong for i in range(40))
    assert exact >= 32
    assert found.bytes_per_s == pytest.approx(slope, abs=1e-6)


@given(st.lists(st.integers(0, 10**12), min_size=2, max_size=30), st.integers(1, 100))
def test_the_slope_does_not_hang_on_the_level_and_turns_with_the_sign(
    memory: list[int], step: int
) -> None:
    def slope(values: list[float]) -> float:
        found = theil_sen([Point(float(i * step), v, 0) for i, v in enumerate(values)])
        assert found is not None
        return found.bytes_per_s

    values = [float(value) for value in memory]
    lowest, highest = min(values), max(values)
    assert slope([v + 10**6 for v in values]) == pytest.approx(slope(values), abs=1e-3)
    assert slope([-v for v in values]) == pytest.approx(-slope(values), abs=1e-3)
    assert abs(slope(values)) <= (highest - lowest) / step


def test_of_many_points_some_are_enough_and_of_none_nothing_is_said() -> None:
    assert theil_sen([]) is None
    assert theil_sen([Point(0, 1, 1)]) is None
    many = [Point(float(i), 3.0 * i, 0) for i in range(MAX_POINTS * 5 + 3)]
    found = theil_sen(many)
    assert found is not None
    assert found.bytes_per_s == pytest.approx(3)
    assert found.rising == 1


# -- detector --------------------------------------------------------------------------------------


def test_a_steady_growth_under_steady_traffic_is_a_leak_once_the_window_is_full() -> None:
    seen = watch(lambda at_s: 500 * MIB + 50_000 * at_s)
    first = next(i for i, growth in enumerate(seen) if growth.leaking)
    assert 600 <= first * 10 <= 720
    assert all(growth.leaking for growth in seen[first:])
    assert seen[-1].bytes_per_s == pytest.approx(50_000)
    assert seen[-1].gained_bytes == pytest.approx(50_000 * 600)


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
def test_other_growth_is_no_leak(
    name: str, memory: Callable[[float], float], traffic: Callable[[float], float] | None
) -> None:
    seen = watch(memory, traffic or (lambda at_s: 8))
    assert not any(growth.leaking for growth in seen), name


def test_a_leak_shows_under_traffic_that_comes_and_goes() -> None:
    seen = watch(lambda t: 500 * MIB + 60_000 * t + MIB * (t % 70), lambda t: float(t % 70))
    assert seen[-1].leaking
    assert seen[-1].bytes_per_s == pytest.approx(60_000, rel=0.5)


# -- turns -----------------------------------------------------------------------------------------


class Store:
    def __init__(self) -> None:
        self.keys: dict[str, str] = {}

    def put_if_absent(self, key: str, value: str) -> bool:
        return self.keys.setdefault(key, value) == value

    def has(self, key: str) -> bool:
        return key in self.keys


@given(st.lists(st.tuples(st.floats(0, 300), st.integers(0, 5)), max_size=60))
def test_two_replacements_of_a_pool_begin_a_whole_turn_apart(
    asks: list[tuple[float, int]],
) -> None:
    store, now, taken = Store(), [0.0], list[float]()
    for number, (pause, replica) in enumerate(asks):
        now[0] += pause
        if Turns(store, "pool", 100.0, lambda: now[0]).take(f"{replica}-{number}"):
            taken.append(now[0])
    assert all(later - earlier >= 100 for earlier, later in pairwise(taken))
    if asks:
        assert taken


def test_pools_do_not_wait_for_each_other_and_a_turn_comes_again() -> None:
    store = Store()
    assert Turns(store, "a", 100, lambda: 50).take("r1")
    assert Turns(store, "b", 100, lambda: 50).take("r2")
    assert not Turns(store, "a", 100, lambda: 60).take("r3")
    assert not Turns(store, "a", 100, lambda: 150).take("r3")
    assert Turns(store, "a", 100, lambda: 250).take("r3")
