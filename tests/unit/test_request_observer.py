"""A request's observer counts each gap of a stream once, and each reader of it sees it."""

from itertools import pairwise
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling.reports import parse_reports
from cluster.config import parse
from cluster.gateway.gateway import Gateway
from cluster.gateway.messages import Request
from cluster.gateway.pools.replica import Wiring
from cluster.gateway.recording.observer import PoolMeter, RequestSinks
from cluster.gateway.recording.request_log import RequestLog
from cluster.gateway.recording.tenant_seconds import TenantSeconds
from cluster.gateway.reporting.dashboard.history import History
from cluster.metrics import Histogram, Registry, exposition
from cluster.usage import Usage

REQUEST = Request("id", "POST", "/v1/completions", b"", [], b"")

segments = st.lists(st.tuples(st.lists(st.floats(0, 400), max_size=30), st.booleans()), max_size=6)


def one_by_one(times: list[float], like: Histogram) -> Histogram:
    """Return a histogram of the gaps between these times."""
    histogram = Histogram(like.bounds)
    for before, after in pairwise(times):
        histogram.observe(after - before)
    return histogram


def check(found: Histogram, times: list[float]) -> None:
    expected = one_by_one(times, found)
    assert found.counts == expected.counts
    assert found.total == pytest.approx(expected.total)


@given(segments)
def test_each_gap_is_counted_once(
    segments: list[tuple[list[float], bool]],
) -> None:
    meter = PoolMeter("m", RequestSinks(Registry(), RequestLog(1.0)))
    observer = meter.observe(REQUEST, REQUEST.path)
    started_s = now = perf_counter()
    times: list[float] = []
    for gaps, read in segments:
        for gap in gaps:
            now += gap
            times.append(now)
            observer.write_times.append(now)
        if read:
            meter.count_gaps()
            check(meter.itl_s, times)
            assert len(observer.write_times) <= 1  # counted times are dropped
    observer.end(Usage(1, 0, len(times)))
    meter.count_gaps()
    check(meter.itl_s, times)
    assert sum(meter.ttft_s.counts) == bool(times)
    assert sum(meter.tpot_s.counts) == (len(times) > 1)
    if times:
        assert meter.ttft_s.total >= times[0] - started_s
    if len(times) > 1:
        mean_s = (times[-1] - times[0]) / (len(times) - 1)
        assert meter.tpot_s.total == pytest.approx(mean_s)


async def test_readers_see_the_gaps_of_open_streams() -> None:
    generator = {"name": "chat", "model": "m", "slo": {"itl_p90_s": 0.1}}
    gateway = Gateway(parse({"generators": [generator]}), {"chat": Wiring(b"secret")})
    history = History(gateway.registry, gateway.pools, TenantSeconds())
    history.sample(100.0, 100.0)
    gateway.load_report(100.0, 1.0)
    observer = gateway.pools["chat"].meter.observe(REQUEST, REQUEST.path)

    observer.write_times += [1.0, 1.5]
    history.sample(101.0, 101.0)
    (second,) = history.since(0)
    assert sum(second.pools["chat"].latencies["itl"].values()) == 1

    observer.write_times += [2.0]
    report = parse_reports(gateway.load_report(102.0, 1.0))["chat"]
    assert report.latencies["itl_p90_s"].samples == 2

    observer.write_times += [3.0]
    text = exposition(gateway.registry).decode()
    assert 'tandem_itl_seconds_count{model="chat"} 3.0' in text
    assert 'tandem_itl_seconds_sum{model="chat"} 2.0' in text
    await gateway.close()


def test_a_response_that_is_not_streamed_has_the_engines_token_times() -> None:
    meter = PoolMeter("m", RequestSinks(Registry(), RequestLog(1.0)))
    observer = meter.observe(REQUEST, REQUEST.path)
    observer.slot_taken("r")
    observer.end(Usage(4, 0, 11, ttft_s=2.0, itl_s=0.25))
    assert sum(meter.ttft_s.counts) == sum(meter.tpot_s.counts) == 1
    assert 2.0 <= meter.ttft_s.total < 2.5  # and the time in the queue
    assert (sum(meter.itl_s.counts), meter.itl_s.total) == (10, 2.5)


def test_the_times_of_writes_have_precedence_over_the_engines() -> None:
    meter = PoolMeter("m", RequestSinks(Registry(), RequestLog(1.0)))
    observer = meter.observe(REQUEST, REQUEST.path)
    observer.slot_taken("r")
    now = perf_counter()
    observer.write_times += [now, now + 1.0]
    observer.end(Usage(4, 0, 2, ttft_s=50.0, itl_s=50.0))
    assert meter.itl_s.total == meter.tpot_s.total == pytest.approx(1.0)
    assert meter.ttft_s.total < 1.0
