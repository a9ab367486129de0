"""Export of a registry as gauges of Ray."""

import pytest

from cluster.asgi import Receive, Scope, Send
from cluster.gateway.pools.routes import RouteTable
from cluster.metrics import Metric, Registry
from deployments import metrics
from deployments.serve_metrics import CountedApp

Exported = dict[tuple[str, tuple[str, ...]], float]


class FakeGauge:
    """Stands in for Ray's gauge; remembers the values of all gauges by name and labels."""

    values: Exported
    help_texts: dict[str, str]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name = name
        self._tag_keys = tag_keys
        self.help_texts[name] = description

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags.keys() == set(self._tag_keys)
        self.values[self._name, tuple(tags.values())] = value


@pytest.fixture(autouse=True)
def fake_gauge(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGauge.values, FakeGauge.help_texts = {}, {}
    monkeypatch.setattr(metrics.ray_metrics, "Gauge", FakeGauge)


def test_a_histogram_is_exported_as_prometheus_series() -> None:
    registry = Registry()
    times = Metric("tandem_time_seconds", "histogram", "Times.", ("model",), (0.1, 1.0))
    for value in (0.05, 0.5, 7.0):
        registry.histogram(times, "m").observe(value)
    metrics.RayMetrics(registry).export()
    assert FakeGauge.values == {
        ("tandem_time_seconds_bucket", ("m", "0.1")): 1,
        ("tandem_time_seconds_bucket", ("m", "1.0")): 2,
        ("tandem_time_seconds_bucket", ("m", "+Inf")): 3,
        ("tandem_time_seconds_count", ("m",)): 3,
        ("tandem_time_seconds_sum", ("m",)): pytest.approx(7.55),
    }


def test_a_renamed_metric_is_exported_under_both_names() -> None:
    registry = Registry()
    renamed = Metric("tandem_new", "gauge", "A level.", ("model",), (), "tandem_old")
    registry.gauge(renamed, "m").value = 3.0
    metrics.RayMetrics(registry).export()
    assert FakeGauge.values == {("tandem_new", ("m",)): 3.0, ("tandem_old", ("m",)): 3.0}
    assert FakeGauge.help_texts == {
        "tandem_new": "A level.",
        "tandem_old": "Deprecated, use tandem_new. A level.",
    }


async def test_requests_of_links_are_exported_under_serves_names() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/fails":
            raise ValueError

    registry = Registry()
    counted = CountedApp(app, RouteTable(["/fails", "/models/{name}"]), registry)
    for path in ("/models/a", "/models/b", "/unknown"):
        await counted({"path": path}, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError):  # noqa: PT011
        await counted({"path": "/fails"}, None, None)  # type: ignore[arg-type]
    metrics.RayMetrics(registry).export()
    requests, errors = (f"serve_deployment_{kind}_counter_total" for kind in ("request", "error"))
    assert FakeGauge.values[requests, ("/models/{name}",)] == 2
    assert FakeGauge.values[requests, ("other",)] == 1
    assert FakeGauge.values[errors, ("/fails",)] == 1
    latency = "serve_deployment_processing_latency_ms"
    assert FakeGauge.values[f"{latency}_count", ("/models/{name}",)] == 2
    assert FakeGauge.values[f"{latency}_bucket", ("/fails", "600000.0")] == 1
