"""OTLP/HTTP trace receiver on loopback, in a thread of the calling process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@contextmanager
def receive_traces(on_export: Callable[[bytes], None]) -> Iterator[str]:
    """Yield the URL of a trace endpoint; each export's protobuf body goes to ``on_export``.

    ``on_export`` is called from several threads at the same time.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            on_export(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class SpanCounter:
    """Number and size of the spans that exporters sent. Thread-safe."""

    def __init__(self) -> None:
        self.count = 0
        self.num_bytes = 0
        self._lock = threading.Lock()

    def add_export(self, body: bytes) -> None:
        """Count the spans of one export."""
        request = ExportTraceServiceRequest.FromString(body)
        spans = sum(len(s.spans) for r in request.resource_spans for s in r.scope_spans)
        with self._lock:
            self.count += spans
            self.num_bytes += len(body)
