"""Probes of ``bench regress``, run as a script on the code that PYTHONPATH selects.

Prints one line of JSON: CPU time by key. Each probe runs several times, and the smallest value
counts, because other load only adds to CPU time (caches, frequency, migrations). Uses only
interfaces that have been stable; a probe that fails is reported on stderr and left out.
"""

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

REPEATS = 5
STREAMS, TOKENS, PACE_S = 64, 64, 0.02
LINK_STREAMS, LINK_CHUNKS, LINK_PASSES = 32, 128, 8
REPLICAS, BLOCKS, DECISIONS = 64, 2**15, 1500
ROUTER_IMPORTS = "import deployments.app"


def router_import_cpu_ms() -> float:
    """Return the CPU time of importing the router's code, in a new process."""

    def children_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before_s = children_s()
    subprocess.run([sys.executable, "-c", ROUTER_IMPORTS], check=True)
    return (children_s() - before_s) * 1e3


def paced_relay_us_per_token() -> float:
    """Return the CPU time per token of gateway, link and simulated engine at an engine's pace.

    On a simulated clock: under other load, delayed steps would merge, and a token would cost less.
    """
    from benchmarks.overload.virtual_time import virtual_time

    with virtual_time() as runner:
        return runner.run(_paced_relay())


async def _paced_relay() -> float:
    from cluster.config import parse
    from cluster.engines.sim.engine import SimEngine
    from cluster.gateway import Gateway, GatewayApp, ReplicaInfo, Wiring
    from cluster.link import LinkServer

    secret = b"s" * 32
    sim = {"decode_s_per_token": PACE_S, "max_num_seqs": STREAMS}
    config = parse({"generators": [{"name": "sim", "model": "sim", "engine": "sim", "sim": sim}]})
    async with contextlib.AsyncExitStack() as stack:
        engine = SimEngine(config.generators[0])
        await engine.start()
        stack.push_async_callback(engine.stop)
        server = LinkServer(engine.app, secret, load=engine.load)
        host, port = await server.start()
        stack.push_async_callback(server.stop)
        gateway = Gateway(config, {"sim": Wiring(secret)})
        stack.push_async_callback(gateway.close)
        gateway.pools["sim"].update([ReplicaInfo("one", host, port, engine.routes())])
        app = GatewayApp(gateway, behind_serve=True)
        await _stream_all(app)  # opens the link, fills caches
        cpu_s = time.process_time()
        await _stream_all(app)
        return (time.process_time() - cpu_s) / (STREAMS * TOKENS) * 1e6


async def _stream_all(app: Any) -> None:
    sizes = await asyncio.gather(*(_stream(app) for _ in range(STREAMS)))
    if min(sizes) < TOKENS:
        raise RuntimeError(f"a stream has {min(sizes)} events, expected {TOKENS}")


async def _stream(app: Any) -> int:
    """Return the number of events of one stream."""
    fields = {"model": "sim", "prompt": "Tell me.", "max_tokens": TOKENS, "ignore_eos": True}
    body = json.dumps({**fields, "stream": True}).encode()
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    num_events = 0

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    def write(piece: bytes) -> bool:
        nonlocal num_events
        num_events += piece.count(b"data: ")
        return True

    async def send(message: Any) -> None:
        write(message.get("body", b""))

    scope["extensions"] = {"tandem.write": write}  # as the router's HTTP server
    await app(scope, receive, send)
    return num_events


def link_us_per_chunk() -> float:
    """Return the CPU time per chunk of both ends of a link, with an instant application."""
    return _run_loop(_link)


async def _link() -> float:
    from cluster.link import LinkClient, LinkServer, RequestHead

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for left in reversed(range(LINK_CHUNKS)):
            await send({"type": "http.response.body", "body": b"x" * 200, "more_body": left > 0})

    async def read_streams() -> None:
        for _ in range(LINK_PASSES):
            stream = client.open(RequestHead(method="POST", path="/"), b"{}")
            await stream.head()
            while await stream.read():
                pass

    server = LinkServer(app, b"benchmark")
    client = LinkClient(*await server.start(), b"benchmark")
    await client.connect()
    cpu_s = time.process_time()
    await asyncio.gather(*(read_streams() for _ in range(LINK_STREAMS)))
    cpu_s = time.process_time() - cpu_s
    await client.close()
    await server.stop()
    return cpu_s / (LINK_STREAMS * LINK_PASSES * LINK_CHUNKS) * 1e6


def decision_us() -> float:
    """Return the mean CPU time of a routing decision."""
    from benchmarks.routing.decisions import LoadedFleet
    from cluster.routing import make_policy

    loaded = LoadedFleet(REPLICAS, BLOCKS)
    policy, used_s = make_policy("prefix", loaded.index), 0.0
    for _ in range(DECISIONS):
        request = loaded.make_request()
        began = time.thread_time()
        chosen = policy.choose(request, loaded.fleet)
        used_s += time.thread_time() - began
        assert chosen is not None
        loaded.place_request(chosen, request)
    return used_s / DECISIONS * 1e6


def metrics_us_per_token() -> float:
    """Return the CPU time of the metrics per token."""
    from benchmarks.metrics.counting import us_per_token

    return us_per_token(500)


def _run_loop(main: Callable[[], Awaitable[float]]) -> float:
    loop_factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main())  # type: ignore[arg-type]


PROBES: tuple[Callable[[], float], ...] = (
    paced_relay_us_per_token,
    link_us_per_chunk,
    decision_us,
    metrics_us_per_token,
    router_import_cpu_ms,
)


def _main() -> None:
    values = {}
    for probe in PROBES:
        try:
            values[probe.__name__] = min(probe() for _ in range(REPEATS))
        except Exception as error:  # the commit has other interfaces
            print(f"{probe.__name__}: {error!r}", file=sys.stderr)
    print(json.dumps(values))


if __name__ == "__main__":
    _main()
