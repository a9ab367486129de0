"""Part 3 of ``bench scale``: clusters of several routers and many simulated replicas."""

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from benchmarks import processes
from benchmarks.endpoint import TargetError
from benchmarks.open_streams import open_streams, raise_file_limit, read_first_token
from benchmarks.report import CellValue, Report, Table, print_progress
from benchmarks.rounds import Summary, interleave
from benchmarks.stream.cost import SETTLE_S, TOKENS, count_tokens
from benchmarks.targets.running import MAX_STREAMS, SIM_MODEL, RunningTarget, sim_generator
from benchmarks.targets.tandem import tandem_with_pools

SHAPES = ("1x8", "2x16", "4x32", "4x64")
"""Routers x replicas."""
STREAMS = 8
"""Streams of each replica."""
PACE_S = 0.05
READY_S = 900.0
CPUS = 0.05
"""Logical CPUs of each replica and router, which limit nothing."""
ROLES = (
    *("haproxy", "proxy", "router", "engine", "controller", "gcs", "raylet", "dashboard"),
    processes.OTHER,
)
_WORDS = {
    "ServeController": "controller",
    "gcs_server": "gcs",
    "raylet/raylet": "raylet",
    "dashboard": "dashboard",
}
"""Role of a process by a substring of its command line, in addition to the usual ones."""

Costs = Mapping[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="routers x replicas")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement")


@dataclass(frozen=True, slots=True)
class LiveResult:
    """One cluster in one round."""

    tokens_s: float
    cpu_us_per_token: Costs
    """CPU microseconds per token by role."""
    idle_cores: Costs
    """CPU use without requests by role, in cores."""
    router_mb: float
    """Mean PSS of a router with its streams."""
    start_s: float


def role_of(command: str) -> str:
    """Return the role of the process with this command line."""
    found = processes.role_of(command)
    if found != processes.OTHER:
        return found
    return next((role for word, role in _WORDS.items() if word in command), found)


def parse_shape(text: str) -> tuple[int, int]:
    """Return routers and replicas of ``2x16``.

    Raises:
        TargetError: It has another form.
    """
    routers, _, replicas = text.partition("x")
    if not (routers.isdecimal() and replicas.isdecimal() and int(routers) and int(replicas)):
        raise TargetError(f"--shapes: {text!r} is not of the form ROUTERSxREPLICAS")
    return int(routers), int(replicas)


def run(args: argparse.Namespace) -> Report:
    """Start each cluster in every round, one after the other."""
    shapes = ["1x2"] if args.quick else args.shapes
    seconds = min(args.seconds, 2.0) if args.quick else args.seconds
    raise_file_limit()
    results: dict[str, list[LiveResult]] = defaultdict(list)
    for number, shape in interleave(shapes, args.rounds):
        result = _measure_cluster(*parse_shape(shape), seconds)
        results[shape].append(result)
        total = sum(result.cpu_us_per_token.values())
        print_progress(number, shape, f"{total:.1f} µs per token, {result.router_mb:.0f} MB")
    return _report(results)


def _measure_cluster(routers: int, replicas: int, seconds: float) -> LiveResult:
    pool = {
        **sim_generator(PACE_S),
        "replicas": {"min": replicas, "max": replicas},
        "resources": {"cpus": CPUS},
    }
    router = {
        "max_connections_per_address": 2 * MAX_STREAMS,
        "replicas": {"min": routers, "max": routers},
        "resources": {"cpus": CPUS},
    }
    cluster = {"num_cpus": max(2, replicas // 4), "ready_timeout_s": READY_S}
    began = time.monotonic()
    with tandem_with_pools({"generators": [pool]}, SIM_MODEL, router, cluster=cluster) as running:
        start_s = time.monotonic() - began
        processes.wait_idle(running.home.path)
        idle_s = _cpu(running, seconds)
        idle = {role: cpu_s / seconds for role, cpu_s in idle_s.items()}
        tokens_s, costs, router_mb = _measure_streams(running, STREAMS * replicas, seconds)
    return LiveResult(tokens_s, costs, idle, router_mb, start_s)


def _cpu(running: RunningTarget, seconds: float) -> Costs:
    home = running.home.path
    before = processes.take_cpu_snapshot(home, role_of)
    time.sleep(seconds)
    return processes.cpu_used(before, processes.take_cpu_snapshot(home, role_of))


def _measure_streams(
    running: RunningTarget, num_streams: int, seconds: float
) -> tuple[float, Costs, float]:
    endpoint, home = running.endpoint, running.home.path
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": TOKENS, "stream": True}
    with open_streams(endpoint, body, num_streams) as streams:
        for stream in streams:
            read_first_token(stream)
        count_tokens(streams, SETTLE_S)
        before, began = processes.take_cpu_snapshot(home, role_of), time.perf_counter()
        num_tokens = count_tokens(streams, seconds)
        wall_s = time.perf_counter() - began
        used = processes.cpu_used(before, processes.take_cpu_snapshot(home, role_of))
        routers = processes.find_processes(home, "router")
        router_mb = fmean(processes.ProcessMemory.read(pid).pss_mb for pid in routers)
    costs = {role: cpu_s / num_tokens * 1e6 for role, cpu_s in used.items()}
    return num_tokens / wall_s, costs, router_mb


def _report(results: dict[str, list[LiveResult]]) -> Report:
    keys: dict[str, Summary] = {}
    costs: list[list[CellValue]] = []
    idle: list[list[CellValue]] = []
    for shape, rounds in results.items():
        total = Summary(tuple(sum(r.cpu_us_per_token.values()) for r in rounds))
        router = Summary(tuple(r.cpu_us_per_token.get("router", 0.0) for r in rounds))
        memory = Summary(tuple(r.router_mb for r in rounds))
        keys |= {
            f"cpu_us_per_token_{shape}": total,
            f"router_us_per_token_{shape}": router,
            f"router_pss_mb_{shape}": memory,
        }
        rate = Summary(tuple(r.tokens_s for r in rounds))
        start = Summary(tuple(r.start_s for r in rounds))
        by_role = [fmean(r.cpu_us_per_token.get(role, 0.0) for r in rounds) for role in ROLES]
        costs.append([shape, *by_role, total, rate, memory, start])
        cores = [fmean(r.idle_cores.get(role, 0.0) for r in rounds) for role in ROLES]
        idle.append([shape, *cores, sum(cores)])
    titles = ("routers x replicas", *ROLES, "total", "tokens/s", "router MB", "start s")
    title = f"CPU µs per token, {STREAMS} streams per replica, a token every {PACE_S * 1e3:g} ms"
    return Report(
        keys=keys,
        tables=[
            Table(title, titles, costs),
            Table("CPU use without requests in cores", (titles[0], *ROLES, "total"), idle),
        ],
        details={"live": dict(results)},
        notes=["router MB is the mean PSS with the streams open; start s until the first answer."],
    )
