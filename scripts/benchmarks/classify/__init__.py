"""Texts a second of the classifier: over HTTP, from a Ray job, in process, and its peers'.

All servers stay up, idle but for the one that is measured; each is measured once in every round.
"""

import argparse
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.classify import report, texts
from benchmarks.classify.servers import SERVERS, SPLIT, infinity_installed
from benchmarks.endpoint import TargetError
from benchmarks.load import drive, require_wrk
from benchmarks.memory.watch import Memory, processes_of
from benchmarks.report import Report
from benchmarks.rounds import interleaved
from benchmarks.targets.home import new_home
from benchmarks.targets.running import Running
from cluster.models.store import models_dir

LOADS = {"1x64": (1, 64), "32x8": (32, 8), "1x1": (1, 1), "4096x1": (4096, 1)}
"""Texts in a request, and connections."""
NUM_BODIES = 128
IN_PROCESS = (
    "bf16 sorted", "bf16 fifo", "bf16 single", "fp32 fifo", "int8 fifo", "int8 sorted",
    "hf-fp32 fifo", "hf-bf16 fifo", "hf-bf16 single", "pipeline",
    "bf16 agreement", "int8 agreement", "fp32 accuracy", "bf16 accuracy", "padding waste",
)  # fmt: skip
JOB_TIMEOUT_S = 120.0
WHOLE_TIMEOUT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench classify``."""
    usual = [name for name in SERVERS if name != SPLIT]
    parser.add_argument("--servers", nargs="*", choices=list(SERVERS), default=usual)
    parser.add_argument(
        "--only-servers", action="store_true", help="leave out what one process computes"
    )
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--seconds", type=float, default=6.0, help="of load in each cell")


def run(args: argparse.Namespace) -> Report:
    """Measure everything in every round."""
    require_wrk()
    if any(name.startswith("infinity") for name in args.servers):
        infinity_installed()
    if args.quick:
        args.seconds = min(args.seconds, 3.0)
    found: report.Found = defaultdict(list)
    with ExitStack() as stack:
        worker = stack.enter_context(_in_process())
        num_tokens = worker.ask("tokens")
        up = {name: stack.enter_context(SERVERS[name]()) for name in args.servers}
        names = [*up] if args.only_servers else ["in process", *up]
        for number, name in interleaved(names, args.rounds):
            _say(f"round {number + 1}: {name}")
            if name == "in process":
                for measurement in IN_PROCESS:
                    found[name, measurement].append(worker.ask(measurement))
            else:
                _measure(found, name, up[name], args)
    return report.make(found, num_tokens)


def _measure(found: report.Found, name: str, server: Running, args: argparse.Namespace) -> None:
    for load_name in args.loads:
        size, connections = LOADS[load_name]
        requests = _requests(server, size)
        if size > 32:
            try:
                found[name, load_name].append(_whole(server, requests[0], size))
            except TargetError as error:  # a peer may take fewer texts in a request
                _say(f"  {error}"[:200])
            continue
        drive(server.endpoint, requests, connections, max(1.0, args.seconds / 4))
        load = drive(server.endpoint, requests, connections, args.seconds)
        found[name, load_name].append(load.requests * size / load.seconds)
        found[name, f"{load_name} p50"].append(load.p50_ms)
        found[name, f"{load_name} p99"].append(load.p99_ms)
    replicas = [Memory.of(pid) for pid in processes_of(server.home.path, "classifier")]
    if replicas:
        found[name, "replica RSS"].append(max(memory.rss_mb for memory in replicas))
        found[name, "replica PSS"].append(max(memory.pss_mb for memory in replicas))
    if server.ray_address and name != SPLIT:
        for load_name in ("1x64", "32x8"):
            found["ray job", load_name].append(_job(server, *LOADS[load_name], args.seconds))


def _whole(server: Running, request: bytes, size: int) -> float:
    """The rate of one request of many texts."""
    endpoint = server.endpoint
    begun = time.perf_counter()
    with socket.create_connection((endpoint.host, endpoint.port), WHOLE_TIMEOUT_S) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    if response.status != http.client.OK:
        raise TargetError(f"{endpoint.url}: {size} texts: {response.status} {body[:300]!r}")
    return size / (time.perf_counter() - begun)


def _requests(server: Running, size: int) -> list[bytes]:
    wanted = texts.load(size * min(NUM_BODIES, max(1, 4096 // size)))
    return [
        server.endpoint.request("/classify", {"model": server.endpoint.model, "input": chunk})
        for chunk in texts.chunks(wanted, size)
    ]


def _job(server: Running, size: int, at_a_time: int, seconds: float) -> float:
    result = server.home.path / "job.json"
    server.home.run(
        *(sys.executable, "-m", "benchmarks.classify.job", server.ray_address),
        *(str(size), str(at_a_time), str(seconds), result),
        timeout_s=JOB_TIMEOUT_S,
    )
    return float(json.loads(result.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class _Worker:
    """The process that measures models without a server."""

    child: subprocess.Popen[str]

    def ask(self, measurement: str) -> float:
        """One number."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{measurement}\n")
        self.child.stdin.flush()
        for line in self.child.stdout:
            word, _, number = line.partition(" ")
            if word == "RESULT":
                _say(f"  {measurement:<16} {float(number):10.4g}")
                return float(number)
        raise TargetError(f"the process that measures {measurement!r} ended")


@contextlib.contextmanager
def _in_process() -> Iterator[_Worker]:
    with new_home("inprocess") as home, (home.path / "log").open("w") as log:
        model = models_dir() / "sentiment-minilm"
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.classify.inprocess", model]
        child = subprocess.Popen(
            command,
            env=home.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with child:
            try:
                yield _Worker(child)
            finally:
                child.kill()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
