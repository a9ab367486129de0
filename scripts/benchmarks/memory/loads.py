"""Loads of ``bench memory``: the engine, and the behaviour of its clients."""

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from benchmarks import token_times
from benchmarks.endpoint import LAST_CHUNK, Endpoint, TargetError
from benchmarks.open_streams import open_streams, read_first_token
from benchmarks.targets.running import sim_generator
from benchmarks.token_times import OK, StreamLoad

IDLE, ACTIVE, STALLED = 1000, 256, 100

PACE_S = 0.020
ACTIVE_TOKENS = 128
IDLE_PACE_S = 10.0
"""Time per token; longer than opening all streams takes, so all get a token at once."""
STALLED_TOKENS, STALLED_PROMPTS = 8000, 4
"""About 8 MB; more than the socket buffers between router and client hold."""
MIN_BYTES = 1_000_000
BUFFER_BYTES = 4096
FILL_S = 20.0
"""Time until all socket buffers are full, so that further data waits in the router."""


@dataclass(frozen=True, slots=True)
class MemoryLoad:
    """Engine and clients of one load."""

    generator: Mapping[str, Any]
    run: Callable[[Endpoint, float], str]
    """Run the clients against an endpoint for some seconds; return a description."""


def _idle(endpoint: Endpoint, seconds: float) -> str:
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": 64, "stream": True}
    with open_streams(endpoint, body, IDLE) as streams:
        for stream in streams:
            read_first_token(stream)
        time.sleep(seconds)
    return f"{IDLE} streams with one token each, then idle for {seconds:g} s"


def _active(endpoint: Endpoint, seconds: float) -> str:
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": ACTIVE_TOKENS, "stream": True}
    request = endpoint.encode_request("/v1/completions", body)
    load = StreamLoad(repeat(request), ACTIVE, PACE_S, warm_up_s=0, measured_s=seconds)
    times = token_times.measure(endpoint, load)
    rate = (len(times.ttft_s) + len(times.itl_s)) / times.wall_s
    return f"{ACTIVE} streams, engine with 20 ms per token; {rate:,.0f} tokens/s"


def _stalled(endpoint: Endpoint, seconds: float) -> str:
    body = {
        "model": endpoint.model,
        "prompt": ["a"] * STALLED_PROMPTS,
        "max_tokens": STALLED_TOKENS,
        "stream": True,
    }
    with open_streams(endpoint, body, STALLED, BUFFER_BYTES) as streams:
        time.sleep(FILL_S + seconds)
        for stream in streams[1:]:
            stream.close()
        size = _read_all(streams[0])
    if size < MIN_BYTES:
        raise TargetError(f"Stalled stream has {size} bytes, expected at least {MIN_BYTES}.")
    waited_s = FILL_S + seconds
    return f"{STALLED} clients with responses of {size / 1e6:.1f} MB, unread for {waited_s:g} s"


def _read_all(stream: socket.socket) -> int:
    size, last = 0, b""
    while not last.endswith(LAST_CHUNK):
        data = stream.recv(1 << 20)
        if not data or (not size and not data.startswith(OK)):
            raise TargetError(f"Stalled stream ended after {size} bytes: {data[:400]!r}")
        size += len(data)
        last = last[-len(LAST_CHUNK) :] + data
    return size


def _generator(decode_s: float, num_streams: int) -> dict[str, Any]:
    """Return the configuration of an engine that runs all streams at the same time."""
    pool = sim_generator(decode_s)
    sim = {**pool["sim"], "max_num_seqs": num_streams, "num_kv_blocks": 1 << 17}
    return {**pool, "sim": sim, "max_in_flight": num_streams}


LOADS: Mapping[str, MemoryLoad] = {
    "1000_idle": MemoryLoad(_generator(IDLE_PACE_S, IDLE), _idle),
    "256_active": MemoryLoad(_generator(PACE_S, ACTIVE), _active),
    "100_stalled": MemoryLoad(_generator(0.0, STALLED * STALLED_PROMPTS), _stalled),
}
