"""Throughput and CPU time of one server that streams from an instant engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks import processes, wrk
from benchmarks.endpoint import Endpoint
from benchmarks.report import CellValue, Table
from benchmarks.targets.running import RunningTarget
from benchmarks.wrk import WrkResult

TOKENS = 128
PATH = "/v1/chat/completions"
WARM_UP_S = 1.5
ROLES = ("haproxy", "proxy", "router", "ingress", "engine", processes.OTHER)

CpuCosts = Mapping[str, Sequence[Mapping[str, float]]]
"""CPU microseconds per token by role; one mapping per round, for each server."""


@dataclass(frozen=True, slots=True)
class StreamResult:
    """One server with one number of connections in one round."""

    req_s: float
    load: WrkResult
    cpu_us_per_token: Mapping[str, float]
    """CPU microseconds per token by role of the target's processes."""
    client_share: float
    """Cores that wrk used."""


def encode_chat(endpoint: Endpoint, path: str = PATH) -> bytes:
    """Return a chat request whose response is a stream of ``TOKENS`` tokens."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "Tell me something."}],
        "max_tokens": TOKENS,
        "stream": True,
    }
    return endpoint.encode_request(path, body)


def measure(
    running: RunningTarget, request: bytes, response_bytes: int, connections: int, seconds: float
) -> StreamResult:
    """Run wrk; ``response_bytes`` comes from ``wrk.measure_response_bytes``."""
    home = running.home.path
    wrk.run_wrk(running.endpoint, request, connections, WARM_UP_S)
    processes.wait_idle(home)
    client_s = wrk.client_cpu_s()
    before = processes.take_cpu_snapshot(home)
    result = wrk.run_wrk(running.endpoint, request, connections, seconds)
    used = processes.cpu_used(before, processes.take_cpu_snapshot(home))
    client_s = wrk.client_cpu_s() - client_s
    processes.wait_idle(home)
    responses = result.count_responses(response_bytes, connections)
    return StreamResult(
        req_s=responses / result.seconds,
        load=result,
        cpu_us_per_token={role: s / responses / TOKENS * 1e6 for role, s in used.items()},
        client_share=client_s / result.seconds,
    )


def cpu_cost_table(title: str, costs: CpuCosts) -> Table:
    """Return a table of the mean CPU costs over the rounds."""
    rows = [_cpu_cost_row(name, rounds) for name, rounds in costs.items()]
    return Table(title, ("server", *ROLES, "total"), rows)


def _cpu_cost_row(name: str, rounds: Sequence[Mapping[str, float]]) -> list[CellValue]:
    means = [fmean(costs.get(role, 0.0) for costs in rounds) for role in ROLES]
    return [name, *(mean or None for mean in means), sum(means)]
