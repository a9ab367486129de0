import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.admission.identity import Tenant, TenantLimits
from cluster.admission.leases import STALE_S, Demand, PeerReports, QuotaReport, TenantReport
from cluster.admission.limits import BURST_S, DAY_S, Counted, TenantQuota, TokenBucket

NOON = 20_000 * DAY_S + DAY_S / 2


def make_quota(share: float = 1.0, **limits: float) -> TenantQuota:
    return TenantQuota(Tenant("t", 1, TenantLimits(**limits)), 0.0, NOON, share)  # type: ignore[arg-type]


def admitted(quota: TenantQuota, num: int, now_s: float, tokens: float = 1) -> int:
    return sum(quota.try_admit(tokens, now_s, NOON) is None for _ in range(num))


@given(st.floats(0.1, 1000), st.lists(st.floats(0, 5), max_size=50))
def test_a_bucket_gives_at_most_its_burst_plus_its_rate(rate: float, pauses: list[float]) -> None:
    bucket, now_s, taken = TokenBucket(rate, 0.0), 0.0, 0.0
    for pause in pauses:
        now_s += pause
        bucket.fill(now_s)
        taken += bucket.level
        bucket.level = 0.0
    assert taken <= max(1.0, rate * BURST_S) + rate * now_s + 1e-6


def test_requests_per_minute_are_enforced_with_retry_after() -> None:
    tenant = make_quota(requests_per_minute=60)
    assert admitted(tenant, 100, 0.0) == 10
    refusal = tenant.try_admit(1, 0.0, NOON)
    assert refusal is not None
    assert (refusal.limit, refusal.retry_after_s) == ("requests_per_minute", pytest.approx(1))
    assert sum(admitted(tenant, 5, float(second)) for second in range(1, 61)) == 60


def test_tokens_may_be_overdrawn_once_and_the_debt_delays_later_requests() -> None:
    tenant = make_quota(tokens_per_minute=600)
    assert tenant.try_admit(1000, 0.0, NOON) is None
    refusal = tenant.try_admit(1, 0.0, NOON)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx((1000 - 100 + 1) / 10)
    tenant.release(1000, 50)  # it used far less
    assert tenant.try_admit(1, 0.0, NOON) is None


def test_concurrent_requests_are_limited() -> None:
    tenant = make_quota(max_concurrent=2)
    assert admitted(tenant, 5, 0.0) == 2
    tenant.release(1, 1)
    assert admitted(tenant, 5, 0.0) == 1


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute"])
def test_lines_of_batches_leave_room_for_other_requests(limit: str) -> None:
    tenant = make_quota(max_concurrent=1, **{limit: 60})  # a burst of 10
    lines = 0
    while (refusal := tenant.try_admit(1, 0.0, NOON, Counted.BATCH_LINE)) is None:
        lines += 1
    assert lines in (5, 6)
    assert refusal.limit == limit
    assert refusal.retry_after_s <= 1.1
    assert tenant.concurrent == 0
    assert tenant.try_admit(1, 0.0, NOON) is None
    tenant.release(1, 1)
    assert tenant.try_admit(1, 2.1, NOON, Counted.BATCH_LINE) is None


def test_the_daily_budget_resets_at_midnight_but_not_when_the_clock_jumps_back() -> None:
    tenant = make_quota(tokens_per_day=100)
    assert tenant.try_admit(100, 0.0, NOON) is None
    refusal = tenant.try_admit(1, 1.0, NOON)
    assert refusal is not None
    assert (refusal.limit, refusal.retry_after_s) == ("tokens_per_day", DAY_S / 2)
    assert tenant.try_admit(1, 1.0, NOON - 2 * DAY_S) is not None
    assert tenant.try_admit(1, 1.0, NOON + DAY_S) is None


@pytest.mark.parametrize("jump_s", [-1e6, -1.0, 1e9])
def test_a_clock_jump_gives_at_most_one_burst(jump_s: float) -> None:
    tenant = make_quota(requests_per_minute=60)
    admitted(tenant, 100, 0.0)
    assert admitted(tenant, 100, jump_s) <= 10
    assert admitted(tenant, 100, jump_s + 1) == 1


def test_changed_limits_keep_the_usage() -> None:
    tenant = make_quota(requests_per_minute=60, max_concurrent=100)
    assert admitted(tenant, 10, 0.0) == 10
    tenant.set_tenant(Tenant("t", 1, TenantLimits(requests_per_minute=600, max_concurrent=12)), 0.0)
    assert admitted(tenant, 10, 0.0) == 0
    assert admitted(tenant, 10, 1.0) == 2  # then 12 are in flight
    tenant.set_tenant(Tenant("t", 1, TenantLimits(max_concurrent=5)), 1.0)
    assert admitted(tenant, 1, 1.0) == 0
    tenant.set_tenant(Tenant("t"), 1.0)
    assert admitted(tenant, 1000, 1.0) == 1000


# -- several routers -------------------------------------------------------------------------------


class Routers:
    """Routers that report to each other, with one tenant's quota at each."""

    def __init__(self, num: int, **limits: float) -> None:
        self.now_s = 0.0
        names = [f"r{number}" for number in range(num)]
        self.peers = {name: PeerReports() for name in names}
        for name, peer in self.peers.items():
            peer.set_routers([other for other in names if other != name])
        self.quotas = {name: make_quota(1 / num, **limits) for name in names}
        self.demands = {name: Demand(0.0, 0.0) for name in names}

    def settle(self, *, deaf: frozenset[str] = frozenset()) -> None:
        day = int(NOON // DAY_S)
        owns = {
            name: TenantReport(
                self.demands[name].update(one.requested_tokens, self.now_s),
                one.concurrent,
                one.day_tokens,
            )
            for name, one in self.quotas.items()
        }
        for name, own in owns.items():
            for other, peer in self.peers.items():
                if other != name and not deaf & {name, other}:
                    peer.add_report(QuotaReport(name, day, {"t": own}), self.now_s)
        for name, one in self.quotas.items():
            lease = self.peers[name].lease_for("t", owns[name], day, self.now_s)
            one.settle(lease, self.now_s)

    def run(self, asks: dict[str, int], seconds: int, tokens: float = 1, **settle: object) -> int:
        """Send each router ``asks`` requests per second; return how many were admitted."""
        total = 0
        for _ in range(seconds):
            self.now_s += 1.0
            for name, num in asks.items():
                total += admitted(self.quotas[name], num, self.now_s, tokens)
            self.settle(**settle)  # type: ignore[arg-type]
        return total


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("skewed", [False, True])
def test_a_rate_holds_over_all_routers_for_even_and_skewed_demand(num: int, skewed: bool) -> None:
    routers = Routers(num, requests_per_minute=600)
    asks = {name: 0 if skewed and name != "r0" else 50 for name in routers.quotas}
    routers.run(asks, 30)
    num_admitted = routers.run(asks, 60)
    assert 600 * 0.9 <= num_admitted <= 600 + num  # the idle routers keep their even share


def test_the_excess_is_bounded_when_demand_moves() -> None:
    routers = Routers(3, requests_per_minute=600)
    routers.run({"r0": 50}, 60)
    num_admitted = routers.run({"r1": 50}, 60)  # fewer at first: demand is a mean over some seconds
    assert 600 * 0.8 <= num_admitted <= 600 + 2 * 10


def test_a_silent_router_counts_as_equal_demand() -> None:
    routers = Routers(2, requests_per_minute=600)
    routers.run({"r0": 50, "r1": 50}, 30)
    deaf = frozenset({"r1"})
    routers.run({"r0": 50, "r1": 50}, int(STALE_S) + 5, deaf=deaf)
    assert routers.run({"r0": 50, "r1": 50}, 60, deaf=deaf) <= 610
    assert routers.quotas["r0"].share == pytest.approx(0.5)


@pytest.mark.parametrize("num", [2, 3])
def test_a_dead_routers_share_is_given_to_the_others_within_the_bound(
    num: int,
) -> None:
    rate_s = 10
    routers = Routers(num, requests_per_minute=60 * rate_s)
    asks = dict.fromkeys(routers.quotas, 50)
    routers.run(asks, 30)
    del asks["r0"]  # dead; the others notice its silence, then are told
    silent = int(STALE_S) + 1
    num_admitted = routers.run(asks, silent, deaf=frozenset({"r0"}))
    alive = list(asks)
    for name in alive:
        routers.peers[name].set_routers([other for other in alive if other != name])
    num_admitted += routers.run(asks, 60, deaf=frozenset({"r0"}))
    seconds = silent + 60
    assert rate_s * seconds * 0.9 <= num_admitted <= rate_s * seconds + (num - 1) * rate_s
    assert sum(routers.quotas[name].share for name in alive) == pytest.approx(1)


def test_a_removed_routers_share_is_returned() -> None:
    routers = Routers(2, requests_per_minute=600)
    routers.run({"r0": 50, "r1": 50}, 30)
    routers.peers["r0"].set_routers([])
    routers.now_s += 1
    lease = routers.peers["r0"].lease_for("t", TenantReport(5.0), 0, routers.now_s)
    assert lease.share == 1


@pytest.mark.parametrize("num", [1, 2, 3])
def test_concurrency_is_exceeded_by_at_most_one_request_per_router(num: int) -> None:
    routers = Routers(num, max_concurrent=10)
    routers.run(dict.fromkeys(routers.quotas, 10), 10)
    concurrent = sum(one.concurrent for one in routers.quotas.values())
    assert 10 <= concurrent <= 10 + num - 1


@pytest.mark.parametrize("num", [1, 2, 3])
def test_the_daily_budget_holds_over_all_routers(num: int) -> None:
    routers = Routers(num, tokens_per_day=10_000)
    taken = 10 * routers.run(dict.fromkeys(routers.quotas, 20), 300, tokens=10)
    assert 9_900 <= taken <= 10_000 + 10 * num * 10


def test_served_tokens_of_peers_are_reported_once_and_survive_restarts() -> None:
    peers = PeerReports()
    peers.set_routers(["b"])

    def say(total: float, router: str = "b") -> dict[tuple[str, str], float]:
        return peers.add_report(
            QuotaReport(router, 0, {"t": TenantReport(served={"gen": total})}), 0.0
        )

    assert say(100) == {}
    assert say(150) == {("t", "gen"): 50}
    assert say(150) == {}
    assert say(0) == {}
    assert say(100, "stranger") == {}


def test_daily_usage_of_a_removed_router_still_counts() -> None:
    peers = PeerReports()
    peers.set_routers(["a", "b"])
    for name in ("a", "b"):
        peers.add_report(QuotaReport(name, 7, {"t": TenantReport(day_tokens=100.0)}), 0.0)
    peers.set_routers(["b"])
    assert peers.lease_for("t", TenantReport(), 7, 0.0).peers_day_tokens == 200
    peers.set_routers(["a", "b"])  # it was alive all the time
    peers.add_report(QuotaReport("a", 7, {"t": TenantReport(day_tokens=150.0)}), 1.0)
    assert peers.lease_for("t", TenantReport(), 7, 1.0).peers_day_tokens == 250
    peers.set_routers([])
    assert peers.lease_for("t", TenantReport(), 7, 1.0).peers_day_tokens == 250
    assert peers.lease_for("t", TenantReport(), 8, 1.0).peers_day_tokens == 0
