"""Fields of a multipart form that a router needs, found in the body without copying its files."""

import re
from collections.abc import Iterator

from python_multipart.multipart import parse_options_header

from cluster.errors import InvalidRequestError
from cluster.routing import RequestBody

MAX_PARTS = 64
MAX_HEADER_BYTES = 8192
MAX_VALUE_BYTES = 1024
"""Longest value of a field that is read; those of others are skipped."""
_READ = (b"model", b"stream")
_DISPOSITION = re.compile(rb"^content-disposition:(.*)$", re.IGNORECASE | re.MULTILINE)
_HEADERS_END = b"\r\n\r\n"


class FormBody(RequestBody):
    """Fields of a multipart form. The router cannot change them, nor read its prompt."""


def read_form(body: bytes, content_type: str) -> FormBody | None:
    """Return the fields of a form; None if the body is no form.

    Raises:
        InvalidRequestError: The form is malformed, or names several models.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        return None
    found: dict[bytes, str] = {}
    for name, value in _fields(body, b"--" + boundary):
        if name in found:
            # Parsers differ in which one they take, and the key may not allow both.
            raise InvalidRequestError(
                f"The form has several fields `{name.decode()}`.", param=name.decode()
            )
        found[name] = value
    stream = found.get(b"stream", "").lower() in ("true", "1", "yes", "on", "t", "y")
    return FormBody(model=found.get(b"model") or None, stream=stream)


def _fields(body: bytes, delimiter: bytes) -> Iterator[tuple[bytes, str]]:
    """Yield name and value of the fields that are read."""
    start = body.find(delimiter)
    delimiter = b"\r\n" + delimiter
    # The first one begins the body; a preamble is allowed before it.
    position = start + len(delimiter) - 2
    for _ in range(MAX_PARTS):
        if start < 0 or body.startswith(b"--", position):
            return
        headers_end = body.find(_HEADERS_END, position, position + MAX_HEADER_BYTES)
        if headers_end < 0:
            raise InvalidRequestError("A part of the form has no end of its headers.")
        value_start = headers_end + len(_HEADERS_END)
        start = body.find(delimiter, value_start)
        name = _name(body[position:headers_end])
        if name in _READ:
            value = body[value_start : start if start >= 0 else len(body)]
            if len(value) > MAX_VALUE_BYTES:
                raise InvalidRequestError(
                    f"The field is longer than {MAX_VALUE_BYTES} bytes.", param=name.decode()
                )
            yield name, value.decode(errors="replace")
        position = start + len(delimiter)
    raise InvalidRequestError(f"The form has more than {MAX_PARTS} fields.")


def _name(headers: bytes) -> bytes:
    disposition = _DISPOSITION.search(headers.replace(b"\r\n", b"\n"))
    if disposition is None:
        return b""
    _, options = parse_options_header(disposition.group(1).strip())
    return options.get(b"name", b"")
