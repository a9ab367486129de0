"""Built-in traces by name, made from a seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.errors import TraceError
from cluster.simulation import workloads
from cluster.simulation.arrivals import Curve, arrivals, bursts, constant, daily
from cluster.simulation.requests import Trace
from cluster.simulation.trace_files import read_trace
from cluster.simulation.workloads import Conversations

GAMMA_SHAPE = 0.5
"""Shape of gamma-distributed gaps that are bursty like BurstGPT's. A guess; there it changes from
hour to hour."""


@dataclass(frozen=True, slots=True)
class BuiltinTrace:
    """Recipe of a built-in trace."""

    spec: Conversations | None
    """None: a retrieval workload."""
    curve: Callable[[np.random.Generator, float], Curve] = lambda rng, duration_s: constant
    shape: float = 1.0
    rate: float = 3.4
    """Default requests/s."""

    def make(self, name: str, rate: float, duration_s: float, seed: int) -> Trace:
        """Make a trace with ``rate`` requests/s on average."""
        rng = np.random.default_rng(seed)
        curve = self.curve(rng, duration_s)
        if self.spec is None:
            starts = arrivals(rng, rate, duration_s, curve, self.shape)
            return Trace(name, workloads.retrieval(rng, starts), workloads.SMALL_BLOCK)
        # A conversation has 1 / (1 - continues) turns on average.
        rate *= 1 - self.spec.continues
        starts = arrivals(rng, rate, duration_s, curve, self.shape)
        requests = workloads.conversations(self.spec, rng, starts, duration_s)
        return Trace(name, requests, self.spec.block_tokens)


BUILTIN_TRACES: Mapping[str, BuiltinTrace] = {
    # Long chats of many turns, and agents with tools and short answers (Mooncake).
    "conversation": BuiltinTrace(workloads.CONVERSATION),
    "toolagent": BuiltinTrace(workloads.TOOLAGENT, rate=6.5),
    # Short questions after examples, and documents before a question.
    "few-shot": BuiltinTrace(workloads.FEW_SHOT, rate=20.0),
    "rag": BuiltinTrace(None, rate=10.0),
    # Chats; after a third of the time, half of the new ones share one prefix.
    "hot-prefix": BuiltinTrace(replace(workloads.CHAT, hot_from=1 / 3), rate=20.0),
    # Short chats that arrive in bursts (BurstGPT); with a daily curve compressed into the simulated
    # time; with minutes of four times the traffic.
    "chat": BuiltinTrace(workloads.CHAT, shape=GAMMA_SHAPE, rate=20.0),
    "daily": BuiltinTrace(workloads.CHAT, lambda _, end_s: daily(end_s), GAMMA_SHAPE, 20.0),
    "bursty": BuiltinTrace(workloads.CHAT, bursts, GAMMA_SHAPE, 20.0),
}


def load_trace(source: str, rate: float | None, duration_s: float | None, seed: int = 0) -> Trace:
    """Return the trace of that name in ``BUILTIN_TRACES``, or read one from a file.

    A file's times are stretched to ``rate`` (requests/s). By default, a trace has its own rate and
    lasts an hour, or as long as the file.

    Raises:
        TraceError: the source is neither, or the file is malformed.
    """
    if source in BUILTIN_TRACES:
        builtin = BUILTIN_TRACES[source]
        return builtin.make(source, rate or builtin.rate, duration_s or 3600.0, seed)
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
