"""Requests in the form that engines get: with the headers of a list, and the router's priority."""

from cluster.gateway.messages import Headers, Request
from cluster.link import RequestHead

FORWARDED_HEADERS = frozenset(
    {
        b"accept",
        b"accept-language",
        b"anthropic-beta",
        b"anthropic-version",
        b"baggage",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"openai-beta",
        b"traceparent",
        b"tracestate",
        b"user-agent",
        b"x-session-id",
    }
)
"""Headers of clients that engines get. All others are dropped, because vLLM's next version may obey
new ones; today they choose the priority and the data-parallel rank, for example."""

_VLLM_PRIORITY = b"x-vllm-priority"


def request_head(request: Request, engine_priority: int | None) -> RequestHead:
    """Return the head that an engine gets.

    Args:
        request: The client's request.
        engine_priority: Priority class for vLLM; None if the engine does not schedule by priority.
    """
    headers: Headers = [pair for pair in request.headers if pair[0] in FORWARDED_HEADERS]
    headers.append((b"x-request-id", request.id.encode()))
    if request.tenant:
        headers.append((b"x-tandem-tenant", request.tenant.encode()))
    if engine_priority is not None:
        # vLLM prefers the header on the paths that generate; elsewhere it reads the body only.
        headers.append((_VLLM_PRIORITY, str(-engine_priority).encode()))
    return RequestHead(
        method=request.method, path=request.path, query_string=request.query, headers=headers
    )
