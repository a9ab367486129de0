"""OTLP receiver that collects spans in the test's process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from benchmarks.otlp import receive_traces


@dataclass(frozen=True)
class ReceivedSpan:
    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    failed: bool
    attributes: dict[str, Any]


class SpanCollector:
    """Spans received from any number of processes."""

    def __init__(self) -> None:
        self.url = ""
        self.raw: list[bytes] = []
        self.spans: list[ReceivedSpan] = []
        self._received = threading.Condition()

    def add_export(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._received:
            self.raw.append(body)
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self.spans += [_span(service, span) for span in scope.spans]
            self._received.notify_all()

    def wait_named(self, name: str, timeout_s: float = 60.0) -> ReceivedSpan:
        """Block until a span of this name has arrived, and return it."""
        with self._received:
            found = self._received.wait_for(lambda: name in [s.name for s in self.spans], timeout_s)
            assert found, f"no span {name!r} after {timeout_s} s, only {self._names()}"
            return next(span for span in self.spans if span.name == name)

    def wait(self, count: int, timeout_s: float = 60.0) -> list[ReceivedSpan]:
        """Block until at least ``count`` spans have arrived, and return all."""
        with self._received:
            found = self._received.wait_for(lambda: len(self.spans) >= count, timeout_s)
            assert found, f"{len(self.spans)} of {count} spans after {timeout_s} s: {self._names()}"
            return list(self.spans)

    def _names(self) -> list[str]:
        return [span.name for span in self.spans]


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value"))


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _span(service: str, span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        service,
        span.name,
        span.kind,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.status.code == 2,
        _attributes(span.attributes),
    )


@contextmanager
def collect_spans() -> Iterator[SpanCollector]:
    collector = SpanCollector()
    with receive_traces(collector.add_export) as collector.url:
        yield collector
