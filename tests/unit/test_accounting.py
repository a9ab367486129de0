"""Energy and cost: learned token costs, their division, meters, and hourly sums."""

import random
import sqlite3
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.accounting import ANONYMOUS, IDLE, LEARNING
from cluster.accounting.costs import TokenCosts, Work
from cluster.accounting.counters import ProcessTree, Rapl, machine_busy_s
from cluster.accounting.ledger import Ledger, Measurement, RequestWork
from cluster.accounting.meter import Meter
from cluster.accounting.usage import UsageKey, UsageSums, as_csv, as_json, parse_time
from cluster.accounting.usage_log import UsageLog
from cluster.errors import InvalidRequestError
from cluster.usage import UsageCounter

SECONDS = 2.0


def measure(joules: float | None, cpu_s: float = 0.0, source: str = "rapl") -> Measurement:
    return Measurement(joules, cpu_s, source)


# -- costs -----------------------------------------------------------------------------------------


def test_token_costs_and_idle_power_are_learned() -> None:
    rng = random.Random(7)
    costs = TokenCosts()
    for _ in range(300):
        work = Work(rng.choice([0, 0, 500, 2000]), rng.choice([0, 50, 200, 400]))
        noise = rng.gauss(1.0, 0.05)
        costs.learn(SECONDS, work, (20 * SECONDS + 0.01 * work.prefill + 0.3 * work.decode) * noise)
    assert costs.idle_power == pytest.approx(20, rel=0.1)
    assert costs.prefill_cost == pytest.approx(0.01, rel=0.3)
    assert costs.decode_cost == pytest.approx(0.3, rel=0.1)


def test_a_kind_of_token_never_seen_costs_as_much_as_the_other() -> None:
    costs = TokenCosts()
    assert not costs.known
    for _ in range(20):
        costs.learn(SECONDS, Work(prefill=100), 50.0)
    assert costs.known
    assert costs.prefill_cost == pytest.approx(0.5, rel=0.01)
    assert costs.decode_cost == pytest.approx(0.5, rel=0.01)


interval = st.tuples(st.integers(0, 10**6), st.integers(0, 10**5), st.floats(0, 1e6))


@given(st.lists(interval, max_size=60))
def test_costs_are_never_negative(intervals: list[tuple[int, int, float]]) -> None:
    costs = TokenCosts()
    for prefill, decode, effort in intervals:
        costs.learn(SECONDS, Work(prefill, decode), effort)
        assert costs.prefill_cost >= 0
        assert costs.decode_cost >= 0
        assert costs.idle_power >= 0


# -- ledger ----------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1000),
            st.lists(st.tuples(st.integers(0, 5), st.integers(0, 300), st.integers(0, 50))),
        ),
        max_size=12,
    )
)
def test_all_energy_and_cost_is_charged_exactly_once(
    intervals: list[tuple[float, list[tuple[int, int, int]]]],
) -> None:
    ledger = Ledger(price_per_s=0.25)
    requests: list[RequestWork] = []
    for joules, arrivals in intervals:
        for request in requests:
            request.usage.completion_tokens += 1
        for tenant, prompt, completion in arrivals:
            usage = UsageCounter()
            requests.append(ledger.open_request(usage, f"t{tenant}"))
            usage.prompt_tokens, usage.completion_tokens = prompt, completion
            if completion % 2:
                requests.pop().end()
        ledger.divide(SECONDS, measure(joules))
    sums = ledger.sums.values()
    assert all(one.joules >= 0 for one in sums)
    assert sum(one.joules for one in sums) == pytest.approx(sum(j for j, _ in intervals))
    assert sum(one.cost for one in sums) == pytest.approx(0.25 * SECONDS * len(intervals))


def test_joules_are_divided_by_tokens_and_idle_energy_is_separate() -> None:
    ledger = Ledger()
    ledger.divide(SECONDS, measure(10))
    one, two = UsageCounter(), UsageCounter()
    first, second = ledger.open_request(one, "a"), ledger.open_request(two, "")
    one.prompt_tokens = 400
    one.cached_tokens = 100
    two.prompt_tokens = 100
    ledger.divide(SECONDS, measure(40))
    assert ledger.sums["a"].joules == pytest.approx(30)
    assert ledger.sums[ANONYMOUS].joules == pytest.approx(10)
    assert ledger.sums[IDLE].joules == pytest.approx(10)
    assert first.joules == pytest.approx(30)
    second.end()
    assert two.settle is None


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_request_reports_charged_energy_plus_an_estimate_of_the_rest() -> None:
    clock = Clock()
    ledger = Ledger(1.0, clock)
    early = UsageCounter(prompt_tokens=5)
    ledger.settle(ledger.open_request(early, "a"))
    assert (early.joules, early.source) == (None, LEARNING)

    usage = UsageCounter(prompt_tokens=95)
    ledger.open_request(usage, "a")
    ledger.divide(SECONDS, measure(50))  # 100 tokens: half a joule and 0.02 each
    usage.prompt_tokens += 10  # after the division
    clock.now += 1
    assert usage.settle is not None
    usage.settle()
    assert usage.source == "rapl"
    assert usage.joules == pytest.approx(52.5, rel=0.01)
    assert usage.cost == pytest.approx(2.1, rel=0.01)


def test_requests_between_divisions_cost_at_most_the_time_since_the_last_one() -> None:
    clock = Clock()
    ledger = Ledger(1.0, clock)
    usages = [UsageCounter(prompt_tokens=1) for _ in range(4)]
    ledger.open_request(usages[0], "a").end()
    ledger.divide(SECONDS, measure(1))  # a nearly idle interval: 2 for a token
    clock.now += 0.5
    for usage in usages[1:]:
        request = ledger.open_request(usage, "a")
        usage.prompt_tokens = 100
        for _ in range(2):  # a second report of a request charges nothing more
            ledger.settle(request)
    assert usages[1].cost == pytest.approx(0.5)
    assert sum(usage.cost or 0.0 for usage in usages[1:]) == pytest.approx(0.5)
    ledger.divide(SECONDS, measure(1))
    clock.now += 0.5
    ledger.settle(request)
    assert usages[-1].cost == pytest.approx(SECONDS / 3)  # the measured share


def test_without_a_counter_cost_is_divided_and_joules_are_missing() -> None:
    ledger = Ledger(price_per_s=1.0)
    usage = UsageCounter(prompt_tokens=10)
    request = ledger.open_request(usage, "a")
    ledger.divide(SECONDS, measure(None, cpu_s=1.5, source="no-counter"))
    ledger.settle(request)
    assert (usage.joules, usage.source) == (None, "no-counter")
    assert usage.cost == pytest.approx(2.0)
    assert ledger.sums["a"].joules == 0


def test_tokens_found_cached_after_charging_stay_charged() -> None:
    ledger = Ledger()
    usage = UsageCounter(prompt_tokens=10)
    request = ledger.open_request(usage, "a")
    ledger.divide(SECONDS, measure(1))
    usage.cached_tokens = 10
    assert request.uncharged_work() == Work(0, 0)


# -- counters and meter ----------------------------------------------------------------------------


def rapl_zone(root: Path, name: str, energy_uj: int) -> None:
    zone = root / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")


def test_rapl_adds_up_packages_and_handles_wraparound(tmp_path: Path) -> None:
    rapl_zone(tmp_path, "intel-rapl:0", 9_000_000)
    rapl_zone(tmp_path, "intel-rapl:0:0", 0)
    rapl_zone(tmp_path, "intel-rapl:1", 0)
    rapl = Rapl(tmp_path)
    assert rapl.joules() == 0
    rapl_zone(tmp_path, "intel-rapl:0", 1_000_000)
    rapl_zone(tmp_path, "intel-rapl:0:0", 9_000_000)
    rapl_zone(tmp_path, "intel-rapl:1", 500_000)
    assert rapl.joules() == pytest.approx(2.5)
    with pytest.raises(FileNotFoundError):
        Rapl(tmp_path / "none")


class FakeSum:
    """A running sum controlled by the test."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self) -> float:
        return self.value


def test_a_replica_gets_its_share_of_rapl_and_all_of_its_gpus() -> None:
    gpu, rapl, own, machine = FakeSum(), FakeSum(), FakeSum(), FakeSum()
    meter = Meter(
        watts_per_core=99.0,
        gpu_joules=gpu,
        rapl_joules=rapl,
        reason="no-counter",
        own_cpu_s=own,
        machine_cpu_s=machine,
    )
    gpu.value, rapl.value, own.value, machine.value = 100.0, 40.0, 1.0, 4.0
    assert meter.has_joules
    assert meter.read() == Measurement(110.0, 1.0, "nvml+rapl")
    assert meter.read() == Measurement(0.0, 0.0, "nvml+rapl")


@pytest.mark.parametrize(
    ("watts", "joules", "source"), [(20.0, 60.0, "estimate"), (None, None, "no-counter")]
)
def test_without_counters_joules_are_estimated_or_missing(
    watts: float | None, joules: float | None, source: str
) -> None:
    own = FakeSum()
    meter = Meter(
        watts_per_core=watts,
        gpu_joules=None,
        rapl_joules=None,
        reason="no-counter",
        own_cpu_s=own,
        machine_cpu_s=FakeSum(),
    )
    own.value = 3.0
    assert meter.has_joules == (watts is not None)
    assert meter.read() == Measurement(joules, 3.0, source)


def test_cpu_clocks_of_this_process_advance() -> None:
    tree = ProcessTree()
    tree.cpu_s()
    busy = machine_busy_s()
    sum(range(3_000_000))  # tens of milliseconds of CPU time
    assert tree.cpu_s() > 0
    assert machine_busy_s() >= busy


# -- usage -----------------------------------------------------------------------------------------


def test_times_are_unix_seconds_or_iso_8601() -> None:
    assert parse_time("3600", "start") == 3600
    assert parse_time("1970-01-01T01:00:00", "start") == 3600
    assert parse_time("1970-01-01T02:00:00+01:00", "start") == 3600
    for wrong in ("yesterday", "nan", "inf", "9999999999999999"):
        with pytest.raises(InvalidRequestError, match="ISO 8601"):
            parse_time(wrong, "end")


def test_missing_joules_are_null_with_a_reason_and_empty_in_csv() -> None:
    sums = UsageSums(1, 10, 0, 5, 0.0, 0.5)
    rows = [(UsageKey(0, "a", "m", "no-counter"), sums)]
    whole = as_json(rows, "EUR")
    assert whole["data"][0]["joules"] is None
    assert "RAPL" in whole["data"][0]["joules_missing"]
    assert whole["total"]["joules"] is None
    assert whole["total"]["cost"] == 0.5
    assert as_json(rows, None)["total"]["cost"] is None
    assert as_csv(rows).splitlines() == [
        "hour,tenant,model,requests,prompt_tokens,cached_tokens,completion_tokens,joules,cost,"
        "joules_source",
        "1970-01-01T00:00:00Z,a,m,1,10,0,5,,0.5,no-counter",
    ]


def test_every_field_is_summed() -> None:
    sums = UsageSums(*range(len(fields(UsageSums))))
    sums.add(sums)
    assert list(asdict(sums).values()) == [2 * number for number in range(len(fields(UsageSums)))]


@pytest.mark.parametrize("name", ["=cmd()", "+1", "-1", "@x"])
def test_tenants_that_look_like_formulas_are_escaped_in_csv(name: str) -> None:
    line = as_csv([(UsageKey(0, name, "m", "rapl"), UsageSums())]).splitlines()[1]
    assert line.split(",")[1].startswith("'")


async def test_routers_share_a_file_and_old_hours_are_deleted(tmp_path: Path) -> None:
    now = 100 * 24 * 3600.0
    one = UsageLog(tmp_path / "home" / "usage", 10, lambda: now)
    two = UsageLog(tmp_path / "home" / "usage", 10, lambda: now)
    one.add_request("a", "m", "rapl", UsageSums(1, 10, 1, 5, 2.0, 0.5))
    two.add_request("a", "m", "rapl", UsageSums(1, 20, 2, 6, 3.0, 0.5))
    two.add_request("", "m", "rapl", UsageSums(1, 1, 0, 0))
    await two.close()
    found = dict(await one.find(now, now + 1, None))
    hour = int(now)
    assert found == {
        UsageKey(hour, ANONYMOUS, "m", "rapl"): UsageSums(1, 1),
        UsageKey(hour, "a", "m", "rapl"): UsageSums(2, 30, 3, 11, 5.0, 1.0),
    }
    assert [key.tenant for key, _ in await one.find(now + 60, now + 61, "a")] == ["a"]
    assert await one.find(now - 3600, now, None) == []
    now += 11 * 24 * 3600
    one.add_request("b", "m", "", UsageSums(1))
    assert [key.tenant for key, _ in await one.find(0, now + 1, None)] == ["b"]
    await one.close()


async def test_sums_that_cannot_be_written_are_kept_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.accounting.usage_log.MAX_PENDING", 2)
    blocked = tmp_path / "usage"
    blocked.mkdir()
    log = UsageLog(blocked, 10, lambda: 0.0)
    for tenant in ("a", "b", "c", "d", "a"):
        log.add_request(tenant, "m", "", UsageSums(1))
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        await log.write()
    blocked.rmdir()
    found = {key.tenant: sums.requests for key, sums in await log.find(0, 1, None)}
    assert found == {"a": 2, "b": 1, "other": 2}
