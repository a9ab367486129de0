"""Closed-loop HTTP load by wrk: each connection sends its next request after a full response."""

import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.endpoint import Endpoint, TargetError, send_request

SCRIPT = Path(__file__).with_name("wrk.lua")
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class WrkResult:
    """Counts and latencies that wrk reports for one run."""

    requests: int
    """Complete responses."""
    num_bytes: int
    seconds: float
    p50_ms: float
    """Latency of a complete response."""
    p99_ms: float
    not_ok: int
    """Responses whose status is not 2xx."""
    broken: int
    """Failed connections."""

    def count_responses(self, response_bytes: int, connections: int) -> float:
        """Return the complete responses plus the received fractions of unfinished ones.

        With a slow server, the responses that the end of the run cuts off are a large part of its
        work; there is at most one per connection. ``response_bytes`` is the size of a response
        to a single client. Under load, chunks are split differently, which changes it slightly.
        """
        unfinished = self.num_bytes / response_bytes - self.requests
        return self.requests + min(max(unfinished, 0.0), connections)


def parse_result(output: str) -> WrkResult:
    """Parse the result line that ``wrk.lua`` prints.

    Raises:
        TargetError: The output has no result line.
    """
    for line in output.splitlines():
        name, _, result = line.partition(" ")
        if name == "RESULT":
            fields: dict[str, Any] = json.loads(result)
            return WrkResult(**fields)
    raise TargetError(f"wrk printed no result: {output.strip()[-400:]}")


def require_wrk() -> None:
    """Raise ``TargetError`` if wrk is not installed."""
    if shutil.which("wrk") is None:
        raise TargetError("wrk is not installed. On Debian: apt-get install wrk")


def run_wrk(
    endpoint: Endpoint, requests: bytes | Sequence[bytes], connections: int, seconds: float
) -> WrkResult:
    """Send one request, or several in turn, over ``connections`` for ``seconds``.

    Raises:
        TargetError: A response was not 2xx, or a connection failed.
    """
    bodies = [requests] if isinstance(requests, bytes) else requests
    with tempfile.TemporaryDirectory(prefix="bench-requests-") as folder:
        files = [Path(folder) / str(index) for index in range(len(bodies))]
        for file, body in zip(files, bodies, strict=True):
            file.write_bytes(body)
        command = [
            "wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", f"--timeout={TIMEOUT_S}s",
            "-s", str(SCRIPT), endpoint.url, "--", *map(str, files),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = parse_result(done.stdout + done.stderr)
    if result.not_ok or result.broken:
        raise TargetError(
            f"{endpoint.url} with {connections} connections: {result.not_ok} of {result.requests} "
            f"responses were not 2xx, {result.broken} connections failed."
        )
    return result


def client_cpu_s() -> float:
    """Return the CPU seconds of all wrk processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_response_bytes(endpoint: Endpoint, request: bytes, num_tokens: int) -> int:
    """Return the size on the wire of one streamed response to a single client.

    Raises:
        TargetError: The stream has fewer than ``num_tokens`` events, or no end.
    """
    response = send_request(endpoint, request)
    events = response.count(b"data: {")
    if events < num_tokens or b"data: [DONE]" not in response:
        raise TargetError(f"{endpoint.url} sent {events} events for {num_tokens} tokens.")
    return len(response)
