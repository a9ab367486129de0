"""Counts the spans that an exporter sends."""

import threading

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Spans:
    """How many came, and in how many bytes; from any number of threads."""

    def __init__(self) -> None:
        self.count = 0
        self.num_bytes = 0
        self._lock = threading.Lock()

    def take(self, body: bytes) -> None:
        """Count one export."""
        request = ExportTraceServiceRequest.FromString(body)
        spans = sum(len(s.spans) for r in request.resource_spans for s in r.scope_spans)
        with self._lock:
            self.count += spans
            self.num_bytes += len(body)
