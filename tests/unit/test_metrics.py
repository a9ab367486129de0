"""Metric definitions, the registry, and the exposition that Prometheus parses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import Metric, Registry, exposition, table
from cluster.metrics.registry import MAX_SERIES

COUNT = Metric("tandem_things_total", "counter", "Things.", ("kind",))
LEVEL = Metric("tandem_level", "gauge", "A level.")
TIMES = Metric("tandem_time_seconds", "histogram", "Times.", ("kind",), (0.1, 1.0))


def test_names_follow_prometheus_conventions() -> None:
    metrics = table.all_metrics()
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert metric.name.startswith("tandem_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert not metric.name.endswith(("_ms", "_minutes", "_percent", "_mb"))


def read(registry: Registry) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(exposition(registry).decode())
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_prometheus_parses_the_exposition() -> None:
    registry = Registry()
    registry.counter(COUNT, "a").add()
    registry.counter(COUNT, "a").add(2)
    registry.counter(COUNT, 'b"\n').add()
    registry.on_collect(lambda: setattr(registry.gauge(LEVEL), "value", 0.5))
    for value in (0.05, 0.1, 0.5, 7.0):
        registry.histogram(TIMES, "x").observe(value)
    assert read(registry) == {
        ("tandem_things_total", "a"): 3,
        ("tandem_things_total", 'b"\n'): 1,
        ("tandem_level", ""): 0.5,
        ("tandem_time_seconds_bucket", "x,0.1"): 2,
        ("tandem_time_seconds_bucket", "x,1.0"): 3,
        ("tandem_time_seconds_bucket", "x,+Inf"): 4,
        ("tandem_time_seconds_count", "x"): 4,
        ("tandem_time_seconds_sum", "x"): pytest.approx(7.65),
    }


@given(st.lists(st.floats(0, 10, allow_nan=False)))
def test_observe_counts_a_value_in_the_first_bucket_that_includes_it(values: list[float]) -> None:
    one_by_one, at_once = (Registry().histogram(TIMES, "x") for _ in range(2))
    for value in values:
        one_by_one.observe(value)
    at_once.observe_all(values)
    assert at_once.counts == one_by_one.counts
    assert at_once.total == pytest.approx(one_by_one.total)
    assert one_by_one.counts == [
        sum(value <= 0.1 for value in values),
        sum(0.1 < value <= 1.0 for value in values),
        sum(value > 1.0 for value in values),
    ]


def test_label_sets_are_limited_and_must_be_complete() -> None:
    registry = Registry()
    for number in range(MAX_SERIES + 5):
        registry.counter(COUNT, str(number)).add()
    assert registry.counter(COUNT, "0").value == 1
    assert registry.counter(COUNT, "yet another").value == 5
    assert len(list(registry.collect())) == MAX_SERIES + 1
    with pytest.raises(ValueError, match="has the labels"):
        registry.counter(COUNT, "a", "b")


def test_renamed_metrics_are_exported_under_both_names() -> None:
    renamed = Metric(
        "tandem_new_seconds",
        "histogram",
        "Times.",
        (),
        (1.0,),
        deprecated_name="tandem_old_seconds",
    )
    registry = Registry()
    registry.histogram(renamed).observe(0.5)
    values = read(registry)
    for name, labels in (("bucket", "1.0"), ("bucket", "+Inf"), ("sum", ""), ("count", "")):
        old, new = (values[f"tandem_{age}_seconds_{name}", labels] for age in ("old", "new"))
        assert old == new > 0
    text = exposition(registry).decode()
    assert "# HELP tandem_old_seconds Deprecated, use tandem_new_seconds. Times." in text
    assert "# HELP tandem_new_seconds Times." in text


def test_histograms_can_be_added_and_copied() -> None:
    one, other = (Registry().histogram(TIMES, "x") for _ in range(2))
    one.observe(0.05)
    other.observe(0.5)
    one.add(other)
    assert (one.counts, one.total) == ([1, 1, 0], pytest.approx(0.55))
    other.set(one)
    one.observe(9)
    assert (other.counts, other.total) == ([1, 1, 0], pytest.approx(0.55))
