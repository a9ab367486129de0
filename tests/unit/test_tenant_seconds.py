"""Seconds of the most active tenants, and the rows that a tenant sees."""

from cluster.gateway.recording.tenant_seconds import LATENCIES, PoolSecond, TenantSeconds
from cluster.gateway.reporting.dashboard.board import COLUMNS, Board, BoardRow
from cluster.gateway.reporting.dashboard.report import Second
from cluster.usage import Usage

T = 1_700_000_000


def value(row: BoardRow, column: str, pool: str = "m") -> float | None:
    return row.pools[pool][COLUMNS.index(column)]


def test_requests_tokens_and_latencies_are_counted_by_tenant() -> None:
    tenants = TenantSeconds()
    tenants.count("a", "m", 200, usage=Usage(5, 0, 7), latencies_s={"ttft": 0.1, "queue": None})
    tenants.count("a", "m", 503)
    tenants.count("a", "m", 200, is_cut_off=True)
    tenants.count("a", "", 404)
    tenants.count("b", "m", 429)
    tenants.count("", "m", 200)  # without keys
    seconds = tenants.take(1.0)
    assert set(seconds) == {"a", "b"}
    ttft = seconds["a"]["m"].latencies.pop("ttft")
    ((bucket, number),) = ttft.items()
    assert number == 1
    bounds = LATENCIES["ttft"].buckets
    assert bounds[bucket - 1] < 0.1 <= bounds[bucket]
    assert seconds["a"] == {
        "m": PoolSecond(requests=3, failed=2, prompt_tokens=5, completion_tokens=7),
        "": PoolSecond(requests=1, refused=1),
    }
    assert tenants.take(1.0) == {}


def test_only_the_most_active_tenants_are_kept() -> None:
    tenants = TenantSeconds(max_tenants=2)
    for _ in range(5):
        for name, number in {"large": 10, "medium": 4, "small": 1}.items():
            for _ in range(number):
                tenants.count(name, "m", 200)
        seconds = tenants.take(1.0)
    assert set(seconds) == {"large", "medium"}
    for _ in range(2000):  # the others left, so that their activity decays
        seconds = tenants.take(1.0)
    tenants.count("small", "m", 200)
    assert set(tenants.take(1.0)) == {"small"}


def test_a_tenants_rows_add_up_its_requests_at_all_routers() -> None:
    def second(time: int, **tenants: dict[str, PoolSecond]) -> Second:
        pools = {"m": PoolSecond(requests=100, in_flight=9)}
        return Second(time, 1.0, pools, unrouted=50, tenants=tenants)

    one = [
        second(T, a={"m": PoolSecond(requests=2), "": PoolSecond(requests=3, refused=3)}),
        second(T + 1),
    ]
    two = [second(T, a={"m": PoolSecond(requests=1, failed=1)}, b={"m": PoolSecond(requests=7)})]
    board, own = Board(["m"]), Board(["m"])
    for _ in board.add_rows([one, two], T + 1):
        pass
    for _ in own.add_rows([board.seconds_of("a", own.last)], T + 1):
        pass
    first, last = own.since(0)
    assert (value(first, "requests"), value(first, "failed")) == (3, 1)
    assert (value(first, "requests", ""), value(first, "refused", "")) == (6, 3)
    assert (value(last, "requests"), value(last, "in_flight")) == (1.5, 0)
    assert board.seconds_of("a", T + 1) == []
