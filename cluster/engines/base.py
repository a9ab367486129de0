"""Interface of all engines: an ASGI application, health, load and prefix cache contents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.asgi import ASGIApp
from cluster.link import Adapters, PrefixSource
from cluster.load import Load
from cluster.metrics import Registry

UNSPECIFIED_MODEL = "default/not-specified"
"""Value of ``model`` by which Infinity's client means the only model."""


@dataclass(frozen=True, slots=True)
class EngineWorker:
    """Process on this node that computes for an engine, and is not its descendant (an actor)."""

    pid: int
    device: str
    """UUID of its GPU, such as ``GPU-5e1f…``; empty without one."""


class Engine(Protocol):
    """One model that serves HTTP-shaped requests in this process.

    Life cycle: ``start`` once, then any number of concurrent calls of ``app``, then ``stop`` once.
    Cancelling the task that runs ``app`` aborts the request in the engine.
    """

    @property
    def app(self) -> ASGIApp:
        """ASGI application; valid between ``start`` and ``stop``.

        It also serves an OpenAPI document of its routes at ``/openapi.json``.
        """

    @property
    def prefixes(self) -> PrefixSource | None:
        """Contents of the prefix cache; None if there is no such cache. Valid after ``start``."""

    @property
    def context_tokens(self) -> int | None:
        """Longest prompt and completion together; None if unlimited. Valid after ``start``."""

    @property
    def resume_key(self) -> str:
        """Replicas with the same key continue each other's answers. Valid after ``start``.

        Empty if the engine keeps no journals (``cluster.asgi.Journal``).
        """

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters that it serves, and those that could not be loaded."""

    @property
    def start_phases_s(self) -> dict[str, float]:
        """Duration of each phase of ``start`` in seconds, in order; empty if not measured."""

    async def start(self) -> None:
        """Load the model; return when the engine can serve.

        Raises:
            ConfigError: The model or an argument is invalid.
            EngineDeadError: The engine's process ended during the start.
        """

    async def reconfigure(self, pool: Any) -> None:
        """Apply another configuration of the pool, of the same type; requests go on.

        Ignores changes of fields that need a restart (``Section.restart_value``).
        """

    async def check_health(self) -> None:
        """Return if the engine works.

        Raises:
            EngineDeadError: The engine has failed for good.
        """

    @property
    def workers(self) -> Sequence[EngineWorker]:
        """Workers in other actors of the placement group, on this node. Valid after ``start``."""

    @property
    def on_demand_bytes(self) -> int:
        """Memory that its processes on this node have reserved and take at first use, in bytes.

        A KV cache on CPUs; otherwise 0. Valid after ``start``.
        """

    def load(self) -> Load:
        """Return the current load; never blocks."""

    def observe(self, registry: Registry) -> None:
        """Write the engine's metrics to the registry; called before each scrape."""

    def routes(self) -> tuple[str, ...]:
        """Return the path templates that ``app`` serves, such as ``/v1/responses/{id}``."""

    async def stop(self) -> None:
        """Stop the engine and all its processes; safe to call twice and after a failure."""
