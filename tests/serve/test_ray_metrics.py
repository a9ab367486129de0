"""Export of a registry as gauges of Ray."""

import pytest

from cluster.metrics import Metric, Registry
from deployments import metrics

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
