from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.recording.tenant_seconds import PoolSecond
from cluster.gateway.reporting.dashboard.board import COLUMNS, WINDOW_S, Board, BoardRow
from cluster.gateway.reporting.dashboard.history import HISTORY_S
from cluster.gateway.reporting.dashboard.report import Second

T = 1_700_000_000


def second(time: int, span_s: float = 1.0, **pool: object) -> Second:
    return Second(time, span_s, {"m": PoolSecond(**pool)})  # type: ignore[arg-type]


def board(*routers: list[Second], until: int = T + 10_000) -> Board:
    made = Board(["m"])
    for _ in made.add_rows(routers, until):
        pass
    return made


def value(row: BoardRow, column: str, model: str = "m") -> float | None:
    return row.pools[model][COLUMNS.index(column)]


def test_rates_cover_the_window_and_levels_its_end() -> None:
    rows = board([second(T + n, requests=n, in_flight=n) for n in range(10)]).since(0)
    assert [row.time for row in rows] == [T + n for n in range(10)]
    assert value(rows[0], "requests") == 0
    assert value(rows[-1], "requests") == (5 + 6 + 7 + 8 + 9) / WINDOW_S
    assert value(rows[-1], "in_flight") == 9
    assert rows[-1].pools[""] == rows[-1].pools["m"]


def test_longer_second_is_not_a_burst() -> None:
    (row,) = board([second(T, span_s=4.0, completion_tokens=400)]).since(0)
    assert value(row, "completion_tokens") == 100


def test_window_excludes_older_seconds() -> None:
    rows = board([second(T, requests=50), second(T + 60, requests=5)]).since(0)
    assert value(rows[-1], "requests") == 5


def test_routers_add_up_but_shared_levels_do_not() -> None:
    one = second(T, requests=2, queued=1, running=5, kv_cache=0.4, latencies={"ttft": {3: 9}})
    two = second(T, requests=4, queued=2, running=6, kv_cache=0.3, latencies={"ttft": {9: 1}})
    (row,) = board([one], [two]).since(0)
    assert value(row, "requests") == 6
    assert value(row, "queued") == 3
    assert value(row, "running") == 6
    assert value(row, "kv_cache") == 0.4
    assert 0.005 < (value(row, "ttft_p50") or 0) < 0.01
    assert (value(row, "ttft_p99") or 0) > 0.25
    assert value(row, "itl_p50") is None


def test_unrouted_requests_count_as_refused_in_total() -> None:
    stray = Second(T, 1.0, {"m": PoolSecond(requests=1)}, unrouted=2)
    (row,) = board([stray], [stray]).since(0)
    assert (value(row, "requests"), value(row, "refused")) == (2, 0)
    assert (value(row, "requests", ""), value(row, "refused", "")) == (6, 4)


def test_missing_second_of_a_router_changes_nothing() -> None:
    rows = board([second(T, requests=1), second(T + 1, requests=1)], [second(T, requests=1)])
    assert [value(row, "requests") for row in rows.since(0)] == [2, 1.5]


def test_each_row_is_computed_once_and_not_too_early() -> None:
    found = board([second(T), second(T + 1), second(T + 2)], until=T + 1)
    assert found.last == T + 1
    for _ in found.add_rows([[second(T + 1, requests=9), second(T + 2)]], T + 2):
        pass
    assert [row.time for row in found.since(T)] == [T + 1, T + 2]
    assert value(found.since(T)[0], "requests") == 0


def test_rows_restart_after_the_clock_is_set_back() -> None:
    found = board([second(T)])
    found.restart_if_set_back(T - 2)
    assert found.last == T
    found.restart_if_set_back(T - 3600)
    assert found.last == 0
    for _ in found.add_rows([[second(T - 3600)]], T - 3600):
        pass
    assert found.last == T - 3600


def test_unknown_pool_of_another_router_is_ignored() -> None:
    newer = Second(T, 1.0, {"new": PoolSecond(requests=5)})
    (row,) = board([second(T, requests=1)], [newer]).since(0)
    assert set(row.pools) == {"m", ""}
    assert value(row, "requests", "") == 1


@given(st.lists(st.integers(0, 1000), max_size=2 * HISTORY_S))
def test_number_of_rows_is_limited(counts: list[int]) -> None:
    found = board([second(T + n, requests=count) for n, count in enumerate(counts)])
    assert len(found.since(0)) == min(len(counts), HISTORY_S)
