"""Plain Ray Serve application: an ingress deployment that streams from an engine's handle.

Runs as ``python -m benchmarks.targets.serve_handle PORT DECODE_S``, which starts a separate Ray.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.endpoint import Endpoint
from benchmarks.ports import free_ports
from benchmarks.targets.home import Home, new_home
from benchmarks.targets.running import SIM_MODEL, RunningTarget, sim_generator
from cluster.launch.environment import cluster_environment, write_haproxy_wrapper

READY_S = 120.0
SETTLE_S = 3.0
"""Pause after the start: HAProxy reloads while replicas start, and drops open connections."""
MAX_ONGOING = 4096
APPLICATION, ENGINE = "peer", "engine"
ADDRESS_FILE = "ray-address"


@contextlib.contextmanager
def serve_default(decode_s: float) -> Iterator[RunningTarget]:
    """Run Serve with its defaults: Python proxy, responses through Ray's object plane."""
    with new_home("serve") as home:
        yield _start(home, decode_s, {})


@contextlib.contextmanager
def serve_handle(decode_s: float) -> Iterator[RunningTarget]:
    """Run Serve at its fastest: HAProxy as Tandem configures it, and throughput settings."""
    with new_home("handle") as home:
        yield _start(home, decode_s, tuned_serve_environment(home))


def tuned_serve_environment(home: Home) -> dict[str, str]:
    """Return the environment of Serve with HAProxy and throughput settings, on free ports."""
    stats, metrics, fallback = map(str, free_ports(3))
    write_haproxy_wrapper(home.cluster_id)
    return {
        **cluster_environment(home.environment, home.path, home.cluster_id, haproxy=True),
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    }


def _start(home: Home, decode_s: float, environment: Mapping[str, str]) -> RunningTarget:
    (port,) = free_ports(1)
    endpoint = Endpoint(port, SIM_MODEL)
    command = (sys.executable, "-m", "benchmarks.targets.serve_handle", str(port), str(decode_s))
    home.spawn(*command, environment=environment)
    home.wait_ready(endpoint, READY_S)
    time.sleep(SETTLE_S)
    # A Ray that ``ray.init`` starts requires a token, which jobs read from the same file.
    job_environment = {**environment, "RAY_AUTH_MODE": "token"}
    return RunningTarget(endpoint, home, ray_address(home), job_environment)


def ray_address(home: Home) -> str:
    """Return the address for jobs of the Ray that was started in ``home``."""
    found = (home.path / ADDRESS_FILE).read_text(encoding="ascii")
    # Ray replaces 127.0.0.1 by the machine's outward address, where this Ray does not listen.
    return found.replace("127.0.0.1", "LOCALHOST")


def _main(port: int, decode_s: float) -> None:
    import ray
    from ray import serve

    context = ray.init(
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=os.environ["TANDEM_HOME"],
        _node_ip_address="127.0.0.1",
    )
    address = str(context.address_info["gcs_address"])
    Path(os.environ["TANDEM_HOME"], ADDRESS_FILE).write_text(address, encoding="ascii")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(_application(decode_s), name=APPLICATION, route_prefix="/")
    signal.pause()


def _application(decode_s: float) -> Any:
    from ray import serve
    from ray.serve.handle import DeploymentHandle
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse

    from cluster.config import GeneratorConfig
    from cluster.engines.sim import SimEngine
    from cluster.serve_internals import confine_replica_to_loopback

    @serve.deployment(name=ENGINE, max_ongoing_requests=MAX_ONGOING)
    class Engine:
        async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
            confine_replica_to_loopback()
            self._engine = SimEngine(GeneratorConfig.model_validate(sim_generator(decode_s)))
            await self._engine.start()

        async def stream(self, path: str, body: bytes) -> AsyncIterator[bytes]:
            async for chunk in _chunks(self._engine.app, path, body):
                yield chunk

        async def unary(self, path: str, body: bytes) -> bytes:
            return b"".join([chunk async for chunk in _chunks(self._engine.app, path, body)])

    @serve.deployment(name="ingress", max_ongoing_requests=MAX_ONGOING)
    class Ingress:
        def __init__(self, engine: DeploymentHandle) -> None:
            confine_replica_to_loopback()
            self._engine = engine.options(stream=True)

        async def __call__(self, request: Request) -> Response:
            if request.method == "GET":
                return JSONResponse({"data": [{"id": SIM_MODEL}]})
            chunks = self._engine.stream.remote(request.url.path, await request.body())
            return StreamingResponse(chunks, media_type="text/event-stream")

    bind: Any = (Engine, Ingress)
    return bind[1].bind(bind[0].bind())


async def _chunks(app: Any, path: str, body: bytes) -> AsyncIterator[bytes]:
    """Yield the body chunks of an ASGI application's response."""
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    requests.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def send(message: dict[str, Any]) -> None:
        messages.put_nowait(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-type", b"application/json")],
    }
    task = asyncio.create_task(app(scope, requests.get, send))
    try:
        more = True
        while more:
            message = await messages.get()
            more = message.get("more_body", True)
            if chunk := message.get("body"):
                yield chunk
    finally:
        task.cancel()


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]))
