"""One load on one path: streams of an instant engine, counted by wrk and by CPU time."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks import cpu, load
from benchmarks.endpoint import Endpoint
from benchmarks.load import Load
from benchmarks.targets.running import Running

TOKENS = 128
PATH = "/v1/chat/completions"
WARM_UP_S = 1.5


@dataclass(frozen=True, slots=True)
class Cell:
    """One path under one load in one round."""

    req_s: float
    load: Load
    cpu_us_per_token: Mapping[str, float]
    """By the parts of the target."""
    client_share: float
    """wrk's share of a core."""


def chat(endpoint: Endpoint, path: str = PATH) -> bytes:
    """The request: a chat whose answer is a stream of ``TOKENS`` tokens."""
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": "Tell me something."}],
        "max_tokens": TOKENS,
        "stream": True,
    }
    return endpoint.request(path, body)


def measure(running: Running, request: bytes, size: int, connections: int, seconds: float) -> Cell:
    """Drive the load; ``size`` is that of a lone answer (``load.answer_size``)."""
    load.drive(running.endpoint, request, connections, WARM_UP_S)
    cpu.settle(running.home.path)
    client_s = load.client_cpu_s()
    before = cpu.snapshot(running.home.path)
    found = load.drive(running.endpoint, request, connections, seconds)
    spent = cpu.spent(before, cpu.snapshot(running.home.path))
    client_s = load.client_cpu_s() - client_s
    cpu.settle(running.home.path)
    answers = found.answers(size, connections)
    return Cell(
        req_s=answers / found.seconds,
        load=found,
        cpu_us_per_token={part: s / answers / TOKENS * 1e6 for part, s in spent.items()},
        client_share=client_s / found.seconds,
    )
