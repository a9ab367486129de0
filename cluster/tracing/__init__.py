"""Spans of requests, router → link → replica → engine, sent by OTLP; off unless configured.

``start_tracer`` is the one way in: it alone imports opentelemetry, and only where an endpoint is
configured, so that a process without tracing pays one ``is None`` for each request. No span ever
holds a text.
"""

from typing import TYPE_CHECKING

from cluster.config.operations import TracingConfig

if TYPE_CHECKING:
    from cluster.tracing.tracer import Tracer

Headers = list[tuple[bytes, bytes]]


def start_tracer(config: TracingConfig | None, service: str, instance: str) -> "Tracer | None":
    """What makes and sends this process' spans; None where tracing is not configured.

    Args:
        config: Where to.
        service: What the process is (``tandem.router``); OpenTelemetry's ``service.name``.
        instance: Which of them; ``service.instance.id``.
    """
    if config is None:
        return None
    from cluster.tracing.tracer import Tracer

    return Tracer(config, service, instance)


__all__ = ["Headers", "start_tracer"]
