"""Budget of retries after lost replicas."""

import pytest

from cluster.gateway.pools.retry_budget import MAX_RATIO, MIN_RETRIES, WINDOW_S, RetryBudget


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def take_all(budget: RetryBudget) -> int:
    return next(number for number in range(100_000) if not budget.take_retry())


@pytest.mark.parametrize(
    ("max_in_flight", "requests", "expected"),
    [(1, 0, MIN_RETRIES), (64, 0, 64), (1, 1000, MAX_RATIO * 1000), (64, 100, 64)],
)
def test_budget_is_a_share_of_the_requests_and_at_least_one_replica(
    max_in_flight: int, requests: int, expected: float
) -> None:
    budget = RetryBudget(max_in_flight, Clock())
    for _ in range(requests):
        budget.add_request()
    assert take_all(budget) == expected


def test_budget_returns_after_the_window() -> None:
    clock = Clock()
    budget = RetryBudget(1, clock)
    for _ in range(1000):
        budget.add_request()
    assert take_all(budget) == 200
    clock.now_s += WINDOW_S - 0.1
    assert not budget.take_retry()
    clock.now_s += 0.2  # the requests of the window before still count
    assert take_all(budget) == 200
    clock.now_s += 3 * WINDOW_S
    assert take_all(budget) == MIN_RETRIES
