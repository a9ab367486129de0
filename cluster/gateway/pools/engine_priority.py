"""Telling vLLM's scheduler a request's class, without reading the body again.

vLLM's smallest ``priority`` goes first. Of a field that stands twice in a JSON object, its parsers
take the last, so the router's own is put at the end and what a client wrote has no effect.
"""

from dataclasses import replace

from cluster.gateway.messages import Request

PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
"""Whose bodies vLLM reads the field from."""


def with_engine_priority(request: Request, priority: int) -> Request:
    """The request with its class in the body; unchanged where that is no JSON object."""
    whole = request.body.rstrip()
    if not whole.endswith(b"}"):
        return request
    head = whole[:-1].rstrip()
    comma = b"" if head.endswith(b"{") else b","
    body = b'%b%b"priority":%d}' % (head, comma, -priority)
    headers = [pair for pair in request.headers if pair[0] != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    return replace(request, headers=headers, body=body)
