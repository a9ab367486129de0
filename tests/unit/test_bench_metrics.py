import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks import metrics
from benchmarks.metrics import counting
from benchmarks.otlp import SpanCounter
from benchmarks.stream.measure import StreamResult
from benchmarks.wrk import WrkResult


def make_turns(off: list[float], on: list[float]) -> metrics.Turns:
    def results(costs: list[float]) -> list[StreamResult]:
        load = WrkResult(1, 1, 1.0, 1.0, 1.0, 0, 0)
        return [
            StreamResult(100.0, load, {"router": cost - 1, "engine": 1.0}, 0.5) for cost in costs
        ]

    return {metrics.OFF: results(off), metrics.ON: results(on)}


def test_the_ratio_compares_neighbouring_turns() -> None:
    # The machine was half as fast in the second turn, and the third turn of one was disturbed.
    turns = make_turns([9.8, 19.6, 9.8], [10.0, 20.0, 15.0])
    assert metrics.ratio_to_off(turns, metrics.ON) == pytest.approx(0.98)


def test_spans_are_counted_over_all_exports() -> None:
    export = ExportTraceServiceRequest()
    for _ in range(2):
        scope = export.resource_spans.add().scope_spans.add()
        scope.spans.add()
        scope.spans.add()
    body = export.SerializeToString()
    spans = SpanCounter()
    spans.add_export(body)
    spans.add_export(body)
    assert (spans.count, spans.num_bytes) == (8, 2 * len(body))


def test_every_token_is_counted() -> None:
    # us_per_token itself compares the counters with the number of tokens.
    assert counting.us_per_token(streams=10) > 0
