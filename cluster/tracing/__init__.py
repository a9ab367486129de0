"""Request spans (router, link, replica, engine), exported over OTLP; off unless configured.

Only ``start_tracer`` imports opentelemetry, and only if an endpoint is configured: without tracing,
a request costs one ``is None``. Spans never contain prompts or completions.
"""

from typing import TYPE_CHECKING

from cluster.config.operations import TracingConfig

if TYPE_CHECKING:
    from cluster.tracing.tracer import Tracer

Headers = list[tuple[bytes, bytes]]


def start_tracer(config: TracingConfig | None, service: str, instance: str) -> "Tracer | None":
    """Return the tracer of this process, or None if tracing is not configured.

    OpenTelemetry's ``service.name`` is the kind of process (``tandem.router``).
    """
    if config is None:
        return None
    from cluster.tracing.tracer import Tracer

    return Tracer(config, service, instance)
