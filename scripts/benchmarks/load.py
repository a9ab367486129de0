"""Closed-loop load by wrk: so many connections, each asks again once its answer is whole."""

import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.endpoint import Endpoint, TargetError, ask

SCRIPT = Path(__file__).with_name("wrk.lua")
TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk saw."""

    requests: int
    """Answers that were complete."""
    num_bytes: int
    seconds: float
    p50_ms: float
    """A whole answer's time."""
    p99_ms: float
    not_ok: int
    """Answers with another status than 2xx."""
    broken: int
    """Connections that failed."""

    def answers(self, answer_bytes: int, connections: int) -> float:
        """Complete answers, and the parts that came of those which the end cut off.

        A slow server's cut-off answers are a good part of its work; there is one on each
        connection at most. ``answer_bytes`` are those of a lone answer, which under load may be
        cut into other chunks and so have a few more or less.
        """
        parts = self.num_bytes / answer_bytes - self.requests
        return self.requests + min(max(parts, 0.0), connections)


def parse(output: str) -> Load:
    """The result that ``wrk.lua`` prints.

    Raises:
        TargetError: there is none in it.
    """
    for line in output.splitlines():
        name, _, result = line.partition(" ")
        if name == "RESULT":
            found: dict[str, Any] = json.loads(result)
            return Load(**found)
    raise TargetError(f"wrk gave no result: {output.strip()[-400:]}")


def require_wrk() -> None:
    """Raise ``TargetError`` where wrk is not installed."""
    if shutil.which("wrk") is None:
        raise TargetError("wrk is needed for the load; on Debian: apt-get install wrk")


def drive(
    endpoint: Endpoint, requests: bytes | Sequence[bytes], connections: int, seconds: float
) -> Load:
    """Send a request, or several in turn, over ``connections`` for ``seconds``.

    Raises:
        TargetError: an answer was no success, or a connection broke.
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
    load = parse(done.stdout + done.stderr)
    if load.not_ok or load.broken:
        raise TargetError(
            f"{endpoint.url}, {connections} connections: of {load.requests} answers "
            f"{load.not_ok} were no success, {load.broken} connections broke"
        )
    return load


def client_cpu_s() -> float:
    """CPU time so far of the wrk processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def answer_size(endpoint: Endpoint, request: bytes, num_tokens: int) -> int:
    """Bytes on the wire of one answer that is asked for alone.

    Raises:
        TargetError: it is not the stream of ``num_tokens`` that was asked for.
    """
    answer = ask(endpoint, request)
    events = answer.count(b"data: {")
    if events < num_tokens or b"data: [DONE]" not in answer:
        raise TargetError(f"{endpoint.url}: {events} events for {num_tokens} tokens")
    return len(answer)
