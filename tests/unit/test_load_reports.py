"""Load reports: from a router's metrics over flat numbers to the signals of a pool."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling import Budget, PoolSignals
from cluster.autoscaling.reports import Latency, LoadReport, merge_reports, parse_reports
from cluster.autoscaling.settings import PoolSettings
from cluster.config import parse
from cluster.gateway.gateway import Gateway
from cluster.gateway.messages import Request
from cluster.gateway.pools.replica import Wiring
from cluster.metrics import quantile
from cluster.usage import Usage

CONFIG = parse(
    {
        "generators": [
            {
                "name": "chat",
                "model": "m",
                "slo": {"itl_p90_s": None},
                "priority": 2,
                "tensor_parallel_size": 2,
                "resources": {"cpus": 1, "gpus": 1},
                "replicas": {"min": 0, "max": 4},
            }
        ],
        "classifiers": [{"name": "labels", "model": "m"}],
        "budget": {"gpus": 6},
    }
)

numbers = st.floats(0, 1e9)
reports = st.builds(
    LoadReport,
    *(numbers for _ in range(9)),
    latencies=st.dictionaries(st.sampled_from("ab"), st.builds(Latency, numbers, numbers)),
)


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True), reports))
def test_reports_survive_flattening(sent: dict[str, LoadReport]) -> None:
    flat = {name: value for pool, one in sent.items() for name, value in one.flatten(pool).items()}
    assert parse_reports({**flat, "running_requests": 3.0, "a/b/c/d": 1.0}) == sent


@pytest.mark.parametrize("lie", [math.nan, math.inf, -1.0])
def test_impossible_report_is_ignored(lie: float) -> None:
    assert parse_reports({**LoadReport(in_flight=5.0).flatten("chat"), "chat/queued": lie}) == {}


def test_reports_of_several_routers_are_merged() -> None:
    one = LoadReport(1, 10, 20, 3, 4, 6, 100, 0.5, latencies={"ttft_p90_s": Latency(1.0, 30)})
    two = LoadReport(2, 30, 40, 5, 0, 6, 200, 0.6, latencies={"ttft_p90_s": Latency(2.0, 10)})
    base = PoolSignals(target=3, running=2, age_s=1.0)
    merged = merge_reports([one, two], {"ttft_p90_s": 2.5, "itl_p90_s": 0.1}, base)
    assert (merged.target, merged.running, merged.age_s) == (3, 2, 1.0)
    assert (merged.requests_per_s, merged.prefill_per_s, merged.decode_per_s) == (3, 40, 60)
    assert (merged.in_flight, merged.queued, merged.kv_usage) == (8, 4, 0.6)
    assert merged.queued_tokens == (4 + 6) * 200
    ttft, itl = merged.objectives
    assert (ttft.observed_s, ttft.samples, ttft.limit_s) == (1.25, 40, 2.5)
    assert (itl.observed_s, itl.samples) == (0.0, 0.0)
    assert merged.is_plausible


async def test_gateway_reports_recent_rates_lengths_and_percentiles() -> None:
    gateway = Gateway(CONFIG, {name: Wiring(b"secret") for name in ("chat", "labels")})
    gateway.load_report(100.0, 1.0)
    meter = gateway.pools["chat"].meter
    asked = Request("id", "POST", "/v1/completions", b"", [], b"")
    for _ in range(12):
        observer = meter.observe(asked, asked.path, lambda _status, _usage, _had_slot: None)
        observer.end(Usage(100, 40, 20))
        meter.ttft_s.observe(0.7)
    report = parse_reports(gateway.load_report(104.0, 3.0))
    chat = report["chat"]
    assert chat.requests_per_s == pytest.approx(3.0)
    assert chat.prefill_per_s == pytest.approx(180.0)
    assert chat.decode_per_s == pytest.approx(60.0)
    assert set(chat.latencies) == {"ttft_p90_s"}
    assert chat.latencies["ttft_p90_s"].samples == 12
    assert 0.5 < chat.latencies["ttft_p90_s"].observed_s <= 1.0
    assert set(report["labels"].latencies) == {"latency_p95_s"}
    assert report[""].cores == pytest.approx(0.5)
    assert parse_reports(gateway.load_report(104.0, 3.0))["chat"].requests_per_s == 3.0
    assert parse_reports(gateway.load_report(140.0, 3.0))["chat"].requests_per_s == 0.0
    quiet = parse_reports(gateway.load_report(142.0, 3.0))["chat"]
    assert (quiet.requests_per_s, quiet.latencies["ttft_p90_s"]) == (0.0, Latency(0.0, 0.0))
    await gateway.close()


def test_percentiles_are_interpolated_in_their_bucket() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert (quantile(bounds, [0, 0, 0, 0], 0.9) or 0.0) == 0.0
    assert quantile(bounds, [10, 0, 0, 0], 0.5) == pytest.approx(0.5)
    assert quantile(bounds, [5, 5, 0, 0], 0.9) == pytest.approx(1.8)
    assert quantile(bounds, [0, 0, 0, 3], 0.9) == 4.0


def test_settings_survive_json() -> None:
    for part in (*CONFIG.generators, *CONFIG.classifiers, CONFIG.router):
        settings = PoolSettings.from_config(CONFIG, part)
        assert PoolSettings.decode(settings.encode()) == settings
    chat = PoolSettings.from_config(CONFIG, CONFIG.generators[0])
    assert (chat.spec.min, chat.spec.cpus, chat.spec.gpus, chat.spec.priority) == (0, 2, 2, 2)
    assert chat.limits == {"ttft_p90_s": 2.0}
    assert chat.budget == Budget(gpus=6)
    assert PoolSettings.from_config(CONFIG, CONFIG.router).spec.is_router
