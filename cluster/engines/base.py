"""What every engine offers: an ASGI application, its health and its load.

A replica owns one engine and knows it through this protocol alone, so vLLM, the simulated
engine and the encoder are interchangeable above it.
"""

from typing import Protocol

from cluster.asgi import ASGIApp
from cluster.link import PrefixSource
from cluster.load import Load
from cluster.metrics import Registry


class Engine(Protocol):
    """One model, ready to answer HTTP-shaped requests in this process.

    Life: ``start`` once, then any number of concurrent calls of ``app``, then ``stop`` once.
    Cancelling the task that runs ``app`` aborts the request in the engine.
    """

    @property
    def app(self) -> ASGIApp:
        """The ASGI application; valid between ``start`` and ``stop``.

        It also serves its part of the OpenAPI document, at ``/openapi.json``.
        """

    @property
    def prefixes(self) -> PrefixSource | None:
        """What it has in its prefix cache; None where it has none. Valid after ``start``."""

    @property
    def start_phases_s(self) -> dict[str, float]:
        """How long each part of ``start`` took, in their order; {}: it does not tell."""

    async def start(self) -> None:
        """Load the model and return when it can answer.

        Raises:
            ConfigError: the model or an argument is wrong.
            EngineDeadError: the engine's process ended during the start.
        """

    async def check_health(self) -> None:
        """Return if the engine works.

        Raises:
            EngineDeadError: it does not, and will not again.
        """

    def load(self) -> Load:
        """The load now; never blocks."""

    def observe(self, registry: Registry) -> None:
        """Write what the engine counted into the registry; called before that is read."""

    def routes(self) -> tuple[str, ...]:
        """The paths that ``app`` serves, as path templates (``/v1/responses/{response_id}``)."""

    async def stop(self) -> None:
        """End the engine and every process of it; safe to call twice and after death."""
