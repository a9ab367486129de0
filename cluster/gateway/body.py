"""Buffering and reading of a request's body."""

from itertools import accumulate

import msgspec

from cluster.asgi import Receive
from cluster.errors import InvalidRequestError, OverloadedError, PayloadTooLargeError
from cluster.gateway.messages import Headers, Request, header
from cluster.routing import RequestBody, decode_body

_EMPTY = RequestBody()
UNREAD_BODY = RequestBody()
"""Stands for a body that is not JSON: it may name any model."""

MAX_JSON_DEPTH = 128
"""Levels of nesting in a JSON body. Python's parsers fail at 1,000, pydantic's at 200."""
_STEPS = bytes(1 if c in b"[{" else 255 if c in b"]}" else 0 for c in range(256))
_PAIR = bytes((1, 255))
_PEELED_LEVELS = 4
_MAX_BRACKETS = 500_000
"""Brackets that are counted one by one, which takes up to 20 ms; no API has larger values."""
_NO_BRACKETS = bytes(c for c in range(256) if c not in b"[]{}")


class BodyBuffers:
    """Request bodies in this process, whose total size is limited.

    Args:
        max_body_bytes: Limit of each body.
        max_buffered_bytes: Limit of all bodies together.
    """

    def __init__(self, max_body_bytes: int, max_buffered_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_buffered_bytes = max_buffered_bytes
        self.used_bytes = 0

    def release(self, num_bytes: int) -> None:
        """Return the bytes of a body that was dropped."""
        self.used_bytes -= num_bytes

    async def receive(self, headers: Headers, receive: Receive) -> bytes:
        """Receive a body; the caller releases its bytes.

        Raises:
            PayloadTooLargeError: The body exceeds its limit.
            OverloadedError: All bodies together exceed theirs.
        """
        declared = header(headers, b"content-length") or ""
        size = int(declared) if declared.isdigit() else 0
        self._check(size, size)
        chunks: list[bytes] = []
        received = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionResetError(
                        "the client disconnected before its request was complete"
                    )
                chunk = message.get("body", b"")
                received += len(chunk)
                self.used_bytes += len(chunk)
                self._check(received, 0)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except BaseException:
            self.release(received)
            raise

    def _check(self, body_bytes: int, additional_bytes: int) -> None:
        if body_bytes > self._max_body_bytes:
            raise PayloadTooLargeError(
                f"Request body is {body_bytes} bytes or more; the limit is "
                f"{self._max_body_bytes} bytes."
            )
        if self.used_bytes + additional_bytes > self._max_buffered_bytes:
            raise OverloadedError(
                f"The router buffers {self.used_bytes} bytes of request bodies; the limit is "
                f"{self._max_buffered_bytes} bytes. Retry later.",
                retry_after_s=1,
            )


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
    _check_depth(request.body)
    try:
        return decode_body(request.path, request.body)
    except RecursionError:  # brackets that are not closed
        raise InvalidRequestError("The request body is nested too deeply.") from None
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"Invalid request body: {error}", param="model") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}") from None


def _has_many(body: bytes, bracket: bytes) -> bool:
    """Return True if a bracket occurs more often than half the limit; `find` uses memchr."""
    position = -1
    for _ in range(MAX_JSON_DEPTH // 2):
        position = body.find(bracket, position + 1)
        if position < 0:
            return False
    return True


def _check_depth(body: bytes) -> None:
    if not (_has_many(body, b"{") or _has_many(body, b"[")):  # the usual case
        return
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside_strings = b"".join(body.split(b'"')[::2])
    brackets = outside_strings.translate(_STEPS, _NO_BRACKETS)
    for _ in range(_PEELED_LEVELS):  # each removes the innermost level
        brackets = brackets.replace(_PAIR, b"")
    is_complex = len(brackets) > _MAX_BRACKETS
    depth = 0 if is_complex else max(accumulate(memoryview(brackets).cast("b")), default=0)
    if is_complex or depth > MAX_JSON_DEPTH - _PEELED_LEVELS:
        raise InvalidRequestError(
            f"The request body is nested too deeply; the limit is {MAX_JSON_DEPTH} levels."
        )
