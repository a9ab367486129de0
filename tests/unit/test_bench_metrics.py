import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks import metrics
from benchmarks.load import Load
from benchmarks.metrics import counting
from benchmarks.metrics.spans import Spans
from benchmarks.stream.cell import Cell


def turns(off: list[float], on: list[float]) -> metrics.Turns:
    def cells(rates: list[float]) -> list[Cell]:
        return [Cell(rate, Load(1, 1, 1.0, 1.0, 1.0, 0, 0), {}, 0.5) for rate in rates]

    return {metrics.OFF: cells(off), metrics.ON: cells(on)}


def test_a_ratio_compares_turns_that_were_beside_each_other() -> None:
    # The machine was half as fast in the second turn, and one turn was disturbed.
    found = turns([100.0, 50.0, 100.0], [98.0, 49.0, 60.0])
    assert metrics.ratio(found, metrics.ON) == pytest.approx(0.98)


def test_spans_are_counted_over_all_exports() -> None:
    export = ExportTraceServiceRequest()
    for _ in range(2):
        scope = export.resource_spans.add().scope_spans.add()
        scope.spans.add()
        scope.spans.add()
    body = export.SerializeToString()
    spans = Spans()
    spans.take(body)
    spans.take(body)
    assert (spans.count, spans.num_bytes) == (8, 2 * len(body))


def test_each_token_is_counted() -> None:
    assert counting.us_per_token(streams=10) > 0
