"""Single uvicorn process with the simulated engine: no router, no Ray.

Runs as ``python -m benchmarks.targets.bare PORT DECODE_S``. uvicorn gets the same options as in
Ray Serve, and uvloop and httptools if they are installed.
"""

import asyncio
import contextlib
import sys
from collections.abc import Iterator

import uvicorn

from benchmarks.endpoint import Endpoint
from benchmarks.ports import free_ports
from benchmarks.targets.home import Home, new_home
from benchmarks.targets.running import SIM_MODEL, RunningTarget, sim_generator
from cluster.asgi import ASGIApp, Receive, Scope, Send
from cluster.config import GeneratorConfig
from cluster.engines.sim import SimEngine

READY_S = 30.0


@contextlib.contextmanager
def bare(decode_s: float) -> Iterator[RunningTarget]:
    """Run the engine's ASGI application under uvicorn."""
    with new_home("bare") as home:
        yield RunningTarget(spawn_bare(home, decode_s), home)


def spawn_bare(home: Home, decode_s: float) -> Endpoint:
    """Start the process in ``home`` and wait until it answers."""
    (port,) = free_ports(1)
    endpoint = Endpoint(port, SIM_MODEL)
    home.spawn(sys.executable, "-m", "benchmarks.targets.bare", str(port), str(decode_s))
    home.wait_ready(endpoint, READY_S)
    return endpoint


class _WithHealth:
    """Adds ``/health``, which ``vllm-router`` polls on its workers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/health":
            await self._app(scope, receive, send)
            return
        length = (b"content-length", b"0")
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _serve(port: int, decode_s: float) -> None:
    engine = SimEngine(GeneratorConfig.model_validate(sim_generator(decode_s)))
    await engine.start()
    config = uvicorn.Config(
        _WithHealth(engine.app),
        port=port,
        lifespan="off",
        access_log=False,
        log_level=None,
        log_config=None,
    )
    await uvicorn.Server(config).serve()


def _main(port: int, decode_s: float) -> None:
    loop_factory = uvicorn.Config("", loop="auto").get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_serve(port, decode_s))


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]))
