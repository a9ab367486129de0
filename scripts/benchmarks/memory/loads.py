"""What the clients do while the router's memory is watched."""

import contextlib
import resource
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from benchmarks import token_times
from benchmarks.endpoint import END, Endpoint, TargetError
from benchmarks.targets.running import generator
from benchmarks.token_times import EVENT, OK, Streams

IDLE, ACTIVE, STALLED = 1000, 256, 100

PACE_S = 0.020
ACTIVE_TOKENS = 128
IDLE_PACE_S = 10.0
"""Longer than it takes to open all streams, so that they get each token together."""
STALLED_TOKENS, STALLED_PROMPTS = 8000, 4
"""About 8 MB: more than the kernel takes in on the way from the router to a client."""
LEAST_BYTES = 1_000_000
BUFFER_BYTES = 4096
FILL_S = 20.0
"""Until every socket on the way is full, and what comes then waits where it must be bounded."""
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """An engine, and the clients that use it."""

    generator: Mapping[str, Any]
    put: Callable[[Endpoint, float], str]
    """Put the load on an endpoint for so many seconds; returns a sentence on what it was."""


def _idle(endpoint: Endpoint, seconds: float) -> str:
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": 64, "stream": True}
    with _streams(endpoint, body, IDLE) as streams:
        for stream in streams:
            _first_token(stream)
        time.sleep(seconds)
    return f"{IDLE} streams with a token each, then nothing for most of {seconds:g} s"


def _active(endpoint: Endpoint, seconds: float) -> str:
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": ACTIVE_TOKENS, "stream": True}
    request = endpoint.request("/v1/completions", body)
    load = Streams(repeat(request), ACTIVE, PACE_S, warm_up_s=0, measured_s=seconds)
    times = token_times.measure(endpoint, load)
    rate = (len(times.ttft_s) + len(times.itl_s)) / times.wall_s
    return f"{ACTIVE} streams of an engine that takes 20 ms a token; {rate:,.0f} tokens/s"


def _stalled(endpoint: Endpoint, seconds: float) -> str:
    body = {
        "model": endpoint.model,
        "prompt": ["a"] * STALLED_PROMPTS,
        "max_tokens": STALLED_TOKENS,
        "stream": True,
    }
    with _streams(endpoint, body, STALLED, BUFFER_BYTES) as streams:
        time.sleep(FILL_S + seconds)
        for stream in streams[1:]:
            stream.close()
        size = _read_all(streams[0])
    if size < LEAST_BYTES:
        raise TargetError(f"a stalled client had {size} bytes to read")
    waited_s = FILL_S + seconds
    return f"{STALLED} clients that read nothing of {size / 1e6:.1f} MB each for {waited_s:g} s"


@contextlib.contextmanager
def _streams(
    endpoint: Endpoint, body: Mapping[str, Any], num: int, buffer_bytes: int | None = None
) -> Iterator[list[socket.socket]]:
    """So many connections, each with a request under way; closed at the end."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    request = endpoint.request("/v1/completions", body)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(socket.socket()) for _ in range(num)]
        for stream in streams:
            stream.settimeout(TIMEOUT_S)
            if buffer_bytes is not None:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            stream.connect((endpoint.host, endpoint.port))
            stream.sendall(request)
        yield streams


def _first_token(stream: socket.socket) -> None:
    came = b""
    while EVENT not in came:
        if not (data := stream.recv(65536)):
            raise TargetError(f"a stream ended with {came[-400:]!r}")
        came += data


def _read_all(stream: socket.socket) -> int:
    size, last = 0, b""
    while not last.endswith(END):
        data = stream.recv(1 << 20)
        if not data or (not size and not data.startswith(OK)):
            raise TargetError(f"a stalled stream broke off after {size} bytes: {data[:400]!r}")
        size += len(data)
        last = last[-len(END) :] + data
    return size


def _generator(decode_s: float, num_streams: int) -> dict[str, Any]:
    """An engine that runs all the streams at a time."""
    one = generator(decode_s)
    sim = {**one["sim"], "max_num_seqs": num_streams, "num_kv_blocks": 1 << 17}
    return {**one, "sim": sim, "max_in_flight": num_streams}


LOADS: Mapping[str, Load] = {
    "1000_idle": Load(_generator(IDLE_PACE_S, IDLE), _idle),
    "256_active": Load(_generator(PACE_S, ACTIVE), _active),
    "100_stalled": Load(_generator(0.0, STALLED * STALLED_PROMPTS), _stalled),
}
