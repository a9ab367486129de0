"""Reading of a request's JSON body."""

import msgspec

from cluster.errors import InvalidRequestError
from cluster.gateway.messages import Request, header
from cluster.routing import RequestBody, decode_body

_EMPTY = RequestBody()
UNREAD_BODY = RequestBody()
"""Stands for a body that is not JSON: it may name any model."""


def read_body(request: Request) -> RequestBody:
    """Return the fields of the body that the router needs; ``UNREAD_BODY`` if it is not JSON.

    Raises:
        InvalidRequestError: The body is not a JSON object, or ``model`` is not a string.
    """
    if not request.body:
        return _EMPTY
    # Engines also accept JSON without a content type, or as text/plain.
    content_type = (header(request.headers, b"content-type") or "json").lower()
    if "json" not in content_type and "text/plain" not in content_type:
        return UNREAD_BODY
    try:
        return decode_body(request.path, request.body)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"Invalid request body: {error}", param="model") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}") from None
