"""Fault points in routers and replicas: link proxy, clock, dying engine, poison, task counts.

``Control`` is what the tests ask for. They write it to ``chaos.json`` in the cluster's home, and
every process reads it again when it changes.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from cluster.asgi import ASGIApp, Receive, Scope, Send
from resilience.inside.link_proxy import LinkFault, LinkProxy

CONTROL_FILE = "chaos.json"
COUNTS_DIR = "counts"
"""Directory in the cluster's home in which each process writes its number of asyncio tasks."""
POISON = b"poison"
"""Value of ``x-session-id`` that kills the replica."""
POLL_S = 0.05
COUNT_S = 1.0
_real_time = time.time


class Control(msgspec.Struct, frozen=True):
    """Faults that are active."""

    clock_step_s: float = 0.0
    """Seconds by which wall clocks of routers and replicas are wrong."""
    link_pid: int = 0
    """Replica whose links have ``link``."""
    link: LinkFault = LinkFault()
    dead_engine_pid: int = 0
    """Replica whose simulated engine dies."""


def write_control(home: Path, control: Control) -> None:
    scratch = home / f"{CONTROL_FILE}.tmp"
    scratch.write_bytes(msgspec.json.encode(control))
    scratch.replace(home / CONTROL_FILE)


def install(module: ModuleType) -> None:
    """Replace ``LinkServer`` in its module by one with fault points."""
    server: Any = module.LinkServer

    class FaultyLinkServer(server):  # type: ignore[misc]  # a class known at run time only
        """Link server behind a proxy, whose process obeys the control file."""

        def __init__(self, app: ASGIApp, secret: bytes, **options: Any) -> None:
            load: Callable[[], Any] | None = options.get("load")
            self._engine = getattr(load, "__self__", None)
            super().__init__(
                PoisonedApp(app) if self._engine is not None else app, secret, **options
            )

        async def start(self) -> tuple[str, int]:
            address: tuple[str, int] = await super().start()
            proxy = None
            if self._engine is not None:  # a replica
                proxy = LinkProxy(address)
                self.address = await proxy.start()
            loop = asyncio.get_running_loop()
            self._control = loop.create_task(obey(proxy, self._engine))
            self._counts = loop.create_task(write_counts())
            return self.address

    module.LinkServer = FaultyLinkServer  # type: ignore[attr-defined]
    time.time = lambda: _real_time() + _clock.step_s


class _Clock:
    step_s = 0.0


_clock = _Clock()


class PoisonedApp:
    """Application of a replica that dies on a poison request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope["headers"]).get(b"x-session-id") == POISON:
            os._exit(1)
        await self._app(scope, receive, send)


async def obey(proxy: LinkProxy | None, engine: Any) -> None:
    """Apply the control file whenever it changes."""
    file = Path(os.environ["TANDEM_HOME"]) / CONTROL_FILE
    changed_ns = 0
    while True:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            if (now_ns := file.stat().st_mtime_ns) != changed_ns:
                changed_ns = now_ns
                control = msgspec.json.decode(file.read_bytes(), type=Control)
                _clock.step_s = control.clock_step_s
                if proxy is not None:
                    is_here = control.link_pid == os.getpid()
                    proxy.set_fault(control.link if is_here else LinkFault())
                if control.dead_engine_pid == os.getpid():
                    engine._die()
        await asyncio.sleep(POLL_S)


async def write_counts() -> None:
    """Write the number of tasks of this process to a file."""
    directory = Path(os.environ["TANDEM_HOME"]) / COUNTS_DIR
    while True:
        with contextlib.suppress(OSError):
            directory.mkdir(exist_ok=True)
            (directory / str(os.getpid())).write_text(str(len(asyncio.all_tasks())))
        await asyncio.sleep(COUNT_S)
