"""Buffering and reading of a request's body."""

import asyncio
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

import msgspec

from cluster.asgi import Receive
from cluster.errors import (
    InvalidRequestError,
    OverloadedError,
    PayloadTooLargeError,
    RequestTimeoutError,
)
from cluster.gateway.form import FormBody, read_form
from cluster.gateway.messages import Headers, Request, header
from cluster.routing import RequestBody, decode_body

SMALL_BODY_BYTES = 64 * 1024
"""Size up to which bodies are accepted beyond the common limit; the number of connections bounds
their total."""
_EMPTY = RequestBody()
UNREAD_BODY = RequestBody()
"""Stands for a body that is not JSON: it may name any model."""

MAX_JSON_DEPTH = 128
"""Levels of nesting in a JSON body. Python's parsers fail at 1,000, pydantic's at 200."""
_STEPS = bytes(1 if c in b"[{" else 255 if c in b"]}" else 0 for c in range(256))
_PAIR = bytes((1, 255))
_PEELED_LEVELS = 4
_MAX_LENGTH_DIGITS = 19
_MAX_BRACKETS = 500_000
"""Brackets that are counted one by one, which takes up to 20 ms; no API has larger values."""
_NO_ESCAPES = bytes(c for c in range(256) if c not in b'[]{}"\\/bfnrtu')
_NO_STRUCTURE = bytes(c for c in range(256) if c not in b'[]{}"')


class BodyBuffers:
    """Request bodies in this process, whose total size is limited.

    Args:
        max_body_bytes: Limit of each body.
        max_buffered_bytes: Limit of all bodies together. A tenant with several bodies gets at most
            as much as remains free for the others (dynamic threshold, as in the queue). Bodies of
            up to ``SMALL_BODY_BYTES`` are always accepted.
        min_bytes_per_s: Minimum average rate at which larger bodies must arrive; 0: none.
        grace_s: Time that a body may take longer, in seconds.
    """

    def __init__(
        self,
        max_body_bytes: int,
        max_buffered_bytes: int,
        min_bytes_per_s: int = 0,
        grace_s: float = 0.0,
    ) -> None:
        self.set_limits(max_body_bytes, max_buffered_bytes, min_bytes_per_s, grace_s)
        self.used_bytes = 0
        self._tenant_bytes: Counter[str] = Counter()  # only tenants that use any

    def set_limits(
        self, max_body_bytes: int, max_buffered_bytes: int, min_bytes_per_s: int, grace_s: float
    ) -> None:
        """Change the limits; see the class. Bodies that are accepted stay."""
        self._min_bytes_per_s = min_bytes_per_s
        self._grace_s = grace_s
        self._max_body_bytes = max_body_bytes
        self._max_buffered_bytes = max_buffered_bytes

    def release(self, num_bytes: int, tenant: str) -> None:
        """Return the bytes of a body that was dropped."""
        self.used_bytes -= num_bytes
        self._tenant_bytes[tenant] -= num_bytes
        if self._tenant_bytes[tenant] <= 0:
            del self._tenant_bytes[tenant]

    async def receive(self, headers: Headers, receive: Receive, tenant: str) -> bytes:
        """Receive a body; the caller releases its bytes.

        Args:
            headers: Headers of the request.
            receive: ASGI's function of that name.
            tenant: Name of the sender's tenant; empty if no keys are configured.

        Raises:
            PayloadTooLargeError: The body exceeds its limit.
            OverloadedError: All bodies together, or those of the tenant, exceed theirs.
            RequestTimeoutError: The body arrives too slowly.
        """
        size = _declared_bytes(headers)
        self._check(size, size, tenant)
        # A slow small body costs nothing, and the timer would cost each request 9 µs.
        if not self._min_bytes_per_s or 0 < size <= SMALL_BODY_BYTES:
            return await self._receive(receive, tenant)
        started_s = asyncio.get_running_loop().time()

        min_bytes_per_s, grace_s = self._min_bytes_per_s, self._grace_s

        def extend(received: int) -> None:
            allowed_s = grace_s + received / min_bytes_per_s
            timeout.reschedule(started_s + allowed_s)

        try:
            async with asyncio.timeout(grace_s) as timeout:
                return await self._receive(receive, tenant, extend)
        except TimeoutError:
            raise RequestTimeoutError(
                f"The request body arrives too slowly; after {grace_s:g} s the minimum is "
                f"{min_bytes_per_s} bytes/s."
            ) from None

    async def _receive(
        self, receive: Receive, tenant: str, on_progress: Callable[[int], None] | None = None
    ) -> bytes:
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
                self._tenant_bytes[tenant] += len(chunk)
                self._check(received, 0, tenant)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
                if on_progress is not None:
                    on_progress(received)
        except BaseException:
            self.release(received, tenant)
            raise

    def _check(self, body_bytes: int, additional_bytes: int, tenant: str) -> None:
        if body_bytes > self._max_body_bytes:
            raise PayloadTooLargeError(
                f"Request body is {body_bytes} bytes or more; the limit is "
                f"{self._max_body_bytes} bytes."
            )
        if body_bytes <= SMALL_BODY_BYTES:
            return
        free_bytes = self._max_buffered_bytes - self.used_bytes - additional_bytes
        tenant_bytes = self._tenant_bytes[tenant] + additional_bytes
        is_only_body = tenant_bytes == body_bytes
        if tenant and not is_only_body and tenant_bytes > free_bytes >= 0:
            raise OverloadedError(
                f"The router buffers {tenant_bytes} bytes of request bodies of tenant '{tenant}'; "
                f"{free_bytes} bytes remain for other tenants, and a tenant may use as much as "
                "remains. Retry later.",
                retry_after_s=1,
            )
        if free_bytes < 0:
            raise OverloadedError(
                f"The router buffers {self.used_bytes} bytes of request bodies; the limit is "
                f"{self._max_buffered_bytes} bytes. Retry later.",
                retry_after_s=1,
            )


def _declared_bytes(headers: Headers) -> int:
    declared = header(headers, b"content-length") or ""
    is_number = declared.isascii() and declared.isdigit() and len(declared) <= _MAX_LENGTH_DIGITS
    return int(declared) if is_number else 0


def read_body(request: Request) -> RequestBody:
    """Return the fields of the body that the router needs.

    ``UNREAD_BODY`` if it is neither JSON nor a form.

    Raises:
        InvalidRequestError: The body is not a JSON object, ``model`` is not a string, or the form
            is malformed.
    """
    if not request.body:
        return _EMPTY
    # Engines also accept JSON without a content type, or as text/plain.
    content_type = (header(request.headers, b"content-type") or "json").lower()
    if content_type.startswith("multipart/form-data"):
        # Boundaries are case-sensitive.
        form = read_form(request.body, header(request.headers, b"content-type") or "")
        return UNREAD_BODY if form is None else form
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


def is_json(body: RequestBody) -> bool:
    """Return True if the router has read the body as JSON."""
    return body is not UNREAD_BODY and not isinstance(body, FormBody)


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
        body = body.translate(None, _NO_ESCAPES).replace(b"\\\\", b"").replace(b'\\"', b"")
    # Strings become pairs of quotes. Dropping a pair does not change what is inside of strings.
    structure = body.translate(None, _NO_STRUCTURE).replace(b'""', b"")
    brackets = b"".join(structure.split(b'"')[::2]).translate(_STEPS)
    for _ in range(_PEELED_LEVELS):  # each removes the innermost level
        brackets = brackets.replace(_PAIR, b"")
    is_complex = len(brackets) > _MAX_BRACKETS
    depth = 0 if is_complex else max(accumulate(memoryview(brackets).cast("b")), default=0)
    if is_complex or depth > MAX_JSON_DEPTH - _PEELED_LEVELS:
        raise InvalidRequestError(
            f"The request body is nested too deeply; the limit is {MAX_JSON_DEPTH} levels."
        )
