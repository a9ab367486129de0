"""Requests in the form that engines get, and their responses in the form that clients get."""

from cluster.gateway.error_formats import engine_error_body
from cluster.gateway.messages import Headers, Request
from cluster.gateway.pools.replica import Answer
from cluster.gateway.recording.request_log import Replay
from cluster.link import REPLAY_HEADER, RequestHead, ResponseHead

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
        method=request.method,
        path=request.path,
        query_string=request.query,
        headers=headers,
        answer_key=request.answer_key,
    )


_NOT_RETURNED = frozenset(
    {
        *(b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade"),
        *(b"server", b"date", b"x-request-id", REPLAY_HEADER),
    }
)
_MAX_ERROR_BYTES = 1024 * 1024
"""Part of an engine's error response that is read; the rest is dropped."""


def response_headers(head: ResponseHead) -> Headers:
    """Return the headers of a response without those that belong to one connection."""
    return [pair for pair in head.headers if pair[0] not in _NOT_RETURNED]


def replay_of(head: ResponseHead) -> Replay | None:
    """Return how the answer to an earlier request is repeated; None if this one began it."""
    for name, value in head.headers:
        if name == REPLAY_HEADER:
            return "finished" if value == b"finished" else "joined"
    return None


async def read_error(path: str, head: ResponseHead, answer: Answer) -> tuple[Headers, bytes]:
    """Read an engine's error response; return its headers and body in the format of its API."""
    content, chunk = b"", await answer.read()
    while chunk:
        content += chunk[: _MAX_ERROR_BYTES - len(content)]
        chunk = await answer.read()
    body = engine_error_body(path, head.status, content)
    kept = [pair for pair in response_headers(head) if not pair[0].startswith(b"content-")]
    length = str(len(body)).encode()
    return [(b"content-type", b"application/json"), (b"content-length", length), *kept], body
