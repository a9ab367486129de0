"""Classifier throughput over HTTP, from a Ray job and in process, compared with its peers.

All servers run all the time, but only one is measured at a time, each once in every round.
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
from benchmarks.classify.openvino_worker import install_openvino
from benchmarks.classify.servers import SERVERS, SPLIT, install_infinity, install_infinity_onnx
from benchmarks.endpoint import TargetError
from benchmarks.processes import ProcessMemory, cpu_used, find_processes, take_cpu_snapshot
from benchmarks.report import Report
from benchmarks.rounds import interleave
from benchmarks.targets.home import new_home
from benchmarks.targets.running import RunningTarget
from benchmarks.wrk import require_wrk, run_wrk
from cluster.models.store import models_dir

LOADS = {"1x64": (1, 64), "32x8": (32, 8), "1x1": (1, 1), "4096x1": (4096, 1)}
"""Texts per request and connections, by name."""
NUM_BODIES = 128
IN_PROCESS_MEASUREMENTS = (
    "bf16 sorted", "bf16 sorted CPU", "bf16 fifo", "bf16 single", report.OPENVINO,
    "fp32 fifo", "int8 fifo", "int8 sorted",
    "hf-fp32 fifo", "hf-bf16 fifo", "hf-bf16 single", "pipeline",
    "bf16 agreement", "int8 agreement", "fp32 accuracy", "bf16 accuracy", "padding waste",
)  # fmt: skip
JOB_TIMEOUT_S = 120.0
LARGE_REQUEST_TIMEOUT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = [name for name in SERVERS if name != SPLIT]
    parser.add_argument(
        "--servers", nargs="*", choices=list(SERVERS), default=default, help="servers to measure"
    )
    parser.add_argument(
        "--only-servers", action="store_true", help="skip the measurements without a server"
    )
    parser.add_argument(
        "--without-openvino", action="store_true", help="do not install and measure OpenVINO"
    )
    parser.add_argument(
        "--loads",
        nargs="+",
        choices=list(LOADS),
        default=list(LOADS),
        help="AxB: A texts per request, B connections",
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of each load")


def run(args: argparse.Namespace) -> Report:
    require_wrk()
    if any(name.startswith("infinity") for name in args.servers):
        install_infinity()
    if "infinity-onnx" in args.servers:
        install_infinity_onnx()
    if args.quick:
        args.seconds = min(args.seconds, 3.0)
    results: report.Results = defaultdict(list)
    with ExitStack() as stack:
        worker = stack.enter_context(_start_worker(sys.executable, "benchmarks.classify.inprocess"))
        workers = dict.fromkeys(IN_PROCESS_MEASUREMENTS, worker)
        del workers[report.OPENVINO]
        if not (args.without_openvino or args.only_servers):
            python, module = install_openvino(), "benchmarks.classify.openvino_worker"
            workers[report.OPENVINO] = stack.enter_context(_start_worker(python, module))
        num_tokens = worker.measure("tokens")
        running = {name: stack.enter_context(SERVERS[name]()) for name in args.servers}
        names = [*running] if args.only_servers else ["in process", *running]
        for number, name in interleave(names, args.rounds):
            _say(f"round {number + 1}: {name}")
            if name == "in process":
                for measurement in IN_PROCESS_MEASUREMENTS:
                    if measurement in workers:
                        value = workers[measurement].measure(measurement)
                        results[name, measurement].append(value)
            else:
                _measure_server(results, name, running[name], args)
    commands = {name: server.command for name, server in running.items()}
    return report.make_report(results, num_tokens, commands)


def _measure_server(
    results: report.Results, name: str, server: RunningTarget, args: argparse.Namespace
) -> None:
    for load_name in args.loads:
        size, connections = LOADS[load_name]
        requests = _requests(server, size)
        if size > 32:
            try:
                results[name, load_name].append(_measure_large_request(server, requests[0], size))
            except TargetError as error:  # some peers limit the texts per request
                _say(f"  {error}"[:200])
            continue
        run_wrk(server.endpoint, requests, connections, max(1.0, args.seconds / 4))
        before = take_cpu_snapshot(server.home.path)
        load = run_wrk(server.endpoint, requests, connections, args.seconds)
        cpu_s = cpu_used(before, take_cpu_snapshot(server.home.path))
        per_1000 = 1000 / max(1, load.requests * size)
        results[name, f"{load_name} CPU"].append(sum(cpu_s.values()) * per_1000)
        if "classifier" in cpu_s:
            results[name, f"{load_name} replica CPU"].append(cpu_s["classifier"] * per_1000)
        results[name, load_name].append(load.requests * size / load.seconds)
        results[name, f"{load_name} p50"].append(load.p50_ms)
        results[name, f"{load_name} p99"].append(load.p99_ms)
    replicas = [ProcessMemory.read(pid) for pid in find_processes(server.home.path, "classifier")]
    if replicas:
        results[name, "replica RSS"].append(max(memory.rss_mb for memory in replicas))
        results[name, "replica PSS"].append(max(memory.pss_mb for memory in replicas))
    if server.ray_address and name != SPLIT:
        for load_name in ("1x64", "32x8"):
            results["ray job", load_name].append(
                _measure_job(server, *LOADS[load_name], args.seconds)
            )


def _measure_large_request(server: RunningTarget, request: bytes, size: int) -> float:
    """Return the texts per second of one request with many texts."""
    endpoint = server.endpoint
    began = time.perf_counter()
    with socket.create_connection(
        (endpoint.host, endpoint.port), LARGE_REQUEST_TIMEOUT_S
    ) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    if response.status != http.client.OK:
        raise TargetError(f"{endpoint.url}, {size} texts: status {response.status}, {body[:300]!r}")
    return size / (time.perf_counter() - began)


def _requests(server: RunningTarget, size: int) -> list[bytes]:
    loaded = texts.load(size * min(NUM_BODIES, max(1, 4096 // size)))
    return [
        server.endpoint.encode_request(
            "/classify", {"model": server.endpoint.model, "input": chunk}
        )
        for chunk in texts.chunks(loaded, size)
    ]


def _measure_job(server: RunningTarget, size: int, concurrency: int, seconds: float) -> float:
    result = server.home.path / "job.json"
    server.home.run(
        *(sys.executable, "-m", "benchmarks.classify.job", server.ray_address),
        *(str(size), str(concurrency), str(seconds), result),
        timeout_s=JOB_TIMEOUT_S,
    )
    return float(json.loads(result.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class _Worker:
    """Process that measures models without a server, with the protocol of ``inprocess``."""

    child: subprocess.Popen[str]

    def measure(self, measurement: str) -> float:
        """Return the result of one measurement."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(f"{measurement}\n")
        self.child.stdin.flush()
        for line in self.child.stdout:
            word, _, number = line.partition(" ")
            if word == "RESULT":
                _say(f"  {measurement:<16} {float(number):10.4g}")
                return float(number)
        raise TargetError(f"The worker process exited while measuring {measurement!r}.")


@contextlib.contextmanager
def _start_worker(python: str | Path, module: str) -> Iterator[_Worker]:
    with new_home("inprocess") as home, (home.path / "log").open("w") as log:
        model = models_dir() / "sentiment-minilm"
        command: list[str | Path] = [python, "-m", module, model]
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
