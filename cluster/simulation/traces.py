"""Traces by their names, and what is common to all that are made from a seed."""

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
"""Of gaps that clump as BurstGPT's do: gamma with a shape below 1. The figure is a guess; there it
changes from hour to hour."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of a trace is made."""

    rate: float
    """Requests/s, the mean over all."""
    duration_s: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Known:
    """A trace that can be made."""

    about: str
    spec: Conversations | None
    """None: retrieval."""
    curve: Callable[[np.random.Generator, float], Curve] = lambda rng, duration_s: constant
    shape: float = 1.0
    rate: float = 3.4
    """Requests/s where nothing is said."""

    @property
    def block_tokens(self) -> int:
        """Tokens of each block."""
        return self.spec.block_tokens if self.spec else workloads.SMALL_BLOCK

    def make(self, name: str, size: Size) -> Trace:
        """The trace of a seed."""
        rng = np.random.default_rng(size.seed)
        goes_on = self.spec.goes_on if self.spec else 0.0
        curve = self.curve(rng, size.duration_s)
        # Each conversation has 1 / (1 - goes_on) turns.
        starts = arrivals(rng, size.rate * (1 - goes_on), size.duration_s, curve, self.shape)
        requests: list[TraceRequest]
        if self.spec is None:
            requests = workloads.retrieval(rng, starts)
        else:
            requests = workloads.conversations(self.spec, rng, starts, size.duration_s)
        return Trace(name, requests, self.block_tokens)


KNOWN: Mapping[str, Known] = {
    "conversation": Known("long chats of many turns (Mooncake)", workloads.CONVERSATION),
    "toolagent": Known(
        "agents with tools, short answers (Mooncake)", workloads.TOOLAGENT, rate=6.5
    ),
    "few-shot": Known("short questions after examples", workloads.FEW_SHOT, rate=20.0),
    "rag": Known("documents before a question", None, rate=10.0),
    "hot-prefix": Known(
        "chats; after a third of the time one beginning is in half of the new ones",
        replace(workloads.CHAT, hot_from=1 / 3),
        rate=20.0,
    ),
    "chat": Known(
        "short chats, arrivals in bursts (BurstGPT)", workloads.CHAT, shape=GAMMA_SHAPE, rate=20.0
    ),
    "daily": Known(
        "the same, up and down once (a day in the time that is simulated)",
        workloads.CHAT,
        lambda rng, duration_s: daily(duration_s),
        GAMMA_SHAPE,
        20.0,
    ),
    "bursty": Known(
        "the same, with minutes of four times the traffic",
        workloads.CHAT,
        bursts,
        GAMMA_SHAPE,
        20.0,
    ),
}


def load(source: str, rate: float | None, duration_s: float | None, seed: int = 0) -> Trace:
    """A trace by its name, or from a file.

    Args:
        source: A name in ``KNOWN``, else a path.
        rate: Requests/s. None: as the trace has it. A file's times are stretched to it.
        duration_s: None: an hour, or all of a file.
        seed: Of a trace that is made.

    Raises:
        TraceError: it is neither, or the file is malformed.
    """
    if source in KNOWN:
        known = KNOWN[source]
        return known.make(source, Size(rate or known.rate, duration_s or 3600.0, seed))
    path = Path(source)
    if not path.is_file():
        raise TraceError(f"{source} is no file and none of {', '.join(KNOWN)}")
    trace = read_trace(path)
    if rate is not None and trace.duration_s > 0:
        factor = len(trace.requests) / trace.duration_s / rate
        stretched = [replace(r, arrival_s=r.arrival_s * factor) for r in trace.requests]
        trace = replace(trace, requests=stretched)
    if duration_s is not None:
        kept = [r for r in trace.requests if r.arrival_s < duration_s]
        trace = replace(trace, requests=kept)
    return trace
