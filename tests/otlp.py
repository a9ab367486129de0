"""The spans that an OTLP receiver in the test's process got."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from benchmarks import otlp


@dataclass(frozen=True)
class Received:
    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    failed: bool
    attributes: dict[str, Any]


class Receiver:
    """What came in, from any number of processes."""

    def __init__(self) -> None:
        self.url = ""
        self.raw: list[bytes] = []
        self.spans: list[Received] = []
        self._news = threading.Condition()

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._news:
            self.raw.append(body)
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self.spans += [_received(service, span) for span in scope.spans]
            self._news.notify_all()

    def wait_named(self, name: str, timeout_s: float = 30.0) -> Received:
        """A span of that name; blocks the calling thread."""
        with self._news:
            came = self._news.wait_for(lambda: name in [s.name for s in self.spans], timeout_s)
            assert came, f"{[span.name for span in self.spans]} after {timeout_s} s"
            return next(span for span in self.spans if span.name == name)

    def wait(self, count: int, timeout_s: float = 30.0) -> list[Received]:
        """So many spans or more; blocks the calling thread."""
        with self._news:
            came = self._news.wait_for(lambda: len(self.spans) >= count, timeout_s)
            assert came, f"{[span.name for span in self.spans]} after {timeout_s} s"
            return list(self.spans)


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value"))


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _received(service: str, span: Any) -> Received:
    return Received(
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
def receiver() -> Iterator[Receiver]:
    received = Receiver()
    with otlp.receive(received.take) as received.url:
        yield received
