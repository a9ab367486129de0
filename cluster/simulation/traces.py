"""Built-in traces by name, made from a seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.errors import TraceError
from cluster.simulation import workloads
from cluster.simulation.arrivals import Curve, arrivals, bursts, constant, daily
from cluster.simulation.requests import Trace, TraceRequest
from cluster.simulation.trace_files import read_trace
from cluster.simulation.workloads import Conversations

GAMMA_SHAPE = 0.5
"""Shape of gamma-distributed gaps that are bursty like BurstGPT's. A guess; there it changes from
hour to hour."""


@dataclass(frozen=True, slots=True)
class TraceSize:
    """Length and rate of a trace."""

    rate: float
    """Mean requests/s."""
    duration_s: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class BuiltinTrace:
    """Recipe of a built-in trace."""

    about: str
    spec: Conversations | None
    """None: a retrieval workload."""
    curve: Callable[[np.random.Generator, float], Curve] = lambda rng, duration_s: constant
    shape: float = 1.0
    rate: float = 3.4
    """Default requests/s."""

    @property
    def block_tokens(self) -> int:
        """Tokens per block."""
        return self.spec.block_tokens if self.spec else workloads.SMALL_BLOCK

    def make(self, name: str, size: TraceSize) -> Trace:
        """Make the trace."""
        rng = np.random.default_rng(size.seed)
        continues = self.spec.continues if self.spec else 0.0
        curve = self.curve(rng, size.duration_s)
        # A conversation has 1 / (1 - continues) turns on average.
        starts = arrivals(rng, size.rate * (1 - continues), size.duration_s, curve, self.shape)
        requests: list[TraceRequest]
        if self.spec is None:
            requests = workloads.retrieval(rng, starts)
        else:
            requests = workloads.conversations(self.spec, rng, starts, size.duration_s)
        return Trace(name, requests, self.block_tokens)


BUILTIN_TRACES: Mapping[str, BuiltinTrace] = {
    "conversation": BuiltinTrace("long chats of many turns (Mooncake)", workloads.CONVERSATION),
    "toolagent": BuiltinTrace(
        "agents with tools, short answers (Mooncake)", workloads.TOOLAGENT, rate=6.5
    ),
    "few-shot": BuiltinTrace("short questions after examples", workloads.FEW_SHOT, rate=20.0),
    "rag": BuiltinTrace("documents before a question", None, rate=10.0),
    "hot-prefix": BuiltinTrace(
        "chats; after a third of the time, half of the new ones share one prefix",
        replace(workloads.CHAT, hot_from=1 / 3),
        rate=20.0,
    ),
    "chat": BuiltinTrace(
        "short chats, arrivals in bursts (BurstGPT)", workloads.CHAT, shape=GAMMA_SHAPE, rate=20.0
    ),
    "daily": BuiltinTrace(
        "like chat, with a daily curve compressed into the simulated time",
        workloads.CHAT,
        lambda rng, duration_s: daily(duration_s),
        GAMMA_SHAPE,
        20.0,
    ),
    "bursty": BuiltinTrace(
        "like chat, with minutes of four times the traffic",
        workloads.CHAT,
        bursts,
        GAMMA_SHAPE,
        20.0,
    ),
}


def load_trace(source: str, rate: float | None, duration_s: float | None, seed: int = 0) -> Trace:
    """Return a built-in trace, or read one from a file.

    Args:
        source: A name in ``BUILTIN_TRACES``, or a path.
        rate: Requests/s; a file's times are stretched to it. None: the trace's own rate.
        duration_s: Length of the trace. None: an hour, or the whole file.
        seed: Seed of a built-in trace.

    Raises:
        TraceError: the source is neither, or the file is malformed.
    """
    if source in BUILTIN_TRACES:
        builtin = BUILTIN_TRACES[source]
        return builtin.make(source, TraceSize(rate or builtin.rate, duration_s or 3600.0, seed))
    path = Path(source)
    if not path.is_file():
        raise TraceError(f"{source} is neither a file nor one of {', '.join(BUILTIN_TRACES)}")
    trace = read_trace(path)
    if rate is not None and trace.duration_s > 0:
        factor = len(trace.requests) / trace.duration_s / rate
        stretched = [replace(r, arrival_s=r.arrival_s * factor) for r in trace.requests]
        trace = replace(trace, requests=stretched)
    if duration_s is not None:
        kept = [r for r in trace.requests if r.arrival_s < duration_s]
        trace = replace(trace, requests=kept)
    return trace
