"""Fields of a multipart form that a router needs, found in the body without copying its files.

Engines read forms with Starlette, which uses the same parser. Where its result depends on more than
the body, such as a charset, the router refuses the form: otherwise a key could use a model that it
does not allow.
"""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from cluster.errors import InvalidRequestError
from cluster.gateway.multipart import FormReader, form_options
from cluster.routing import RequestBody

MAX_PARTS = 64
MAX_HEADER_BYTES = 8192
"""Size of the headers of one part."""
MAX_VALUE_BYTES = 1024
"""Longest value of a field that is read; those of others are skipped."""
_READ = (b"model", b"stream")
_CHARSETS = (b"utf-8", b"utf8")
_DELIMITER_ENDS = (b"\r\n", b"--")


class FormBody(RequestBody):
    """Fields of a multipart form. The router cannot change them, nor read its prompt."""


class _Form(FormReader):
    """Reader that copies only the values of the fields that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[bytes, bytes] = {}
        self._begin_part()

    def _begin_part(self) -> None:
        self._header_bytes = 0
        self._disposition: bytes | None = None
        self._name = b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header_bytes(end - start)
        super()._add_header_name(data, start, end)

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header_bytes(end - start)
        super()._add_header_value(data, start, end)

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > MAX_HEADER_BYTES:
            raise InvalidRequestError(
                f"The headers of a part of the form are longer than {MAX_HEADER_BYTES} bytes."
            )

    def _keep_header(self, name: bytes, value: bytes) -> None:
        if b"\n" in value or b"\r" in value:
            raise InvalidRequestError("A header of the form contains a line break.")
        if name == b"content-disposition":
            if self._disposition is not None:
                raise InvalidRequestError("A part of the form has several Content-Disposition.")
            self._disposition = value

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidRequestError("A part of the form has no name.")
        name = options[b"name"]
        if name not in _READ:
            return
        param = name.decode()
        if name in self.fields:
            # Parsers differ in which one they take, and the key may not allow both.
            raise InvalidRequestError(f"The form has several fields `{param}`.", param=param)
        if b"filename" in options:
            raise InvalidRequestError(f"The field `{param}` is a file; send text.", param=param)
        self._name = name
        self.fields[name] = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if not self._name:
            return
        if len(self.fields[self._name]) + end - start > MAX_VALUE_BYTES:
            raise InvalidRequestError(
                f"The field is longer than {MAX_VALUE_BYTES} bytes.", param=self._name.decode()
            )
        self.fields[self._name] += data[start:end]


def read_form(body: bytes, content_type: str) -> FormBody | None:
    """Return the fields of a form; None if the body is no form.

    Raises:
        InvalidRequestError: The form is malformed, names several models, or parsers may differ in
            the model that it names.
    """
    options = form_options(content_type)
    if options is None:
        return None
    boundary = options[b"boundary"]
    charset = options.get(b"charset", b"utf-8")
    if charset.lower() not in _CHARSETS:
        raise InvalidRequestError(
            f"The charset of the form is `{charset.decode('latin-1')}`; send UTF-8."
        )
    _check_delimiters(body, b"--" + boundary)
    form = _Form()
    try:
        form.parser(boundary).write(body)
    except FormParserError as error:
        raise InvalidRequestError(f"The form cannot be read: {error}.") from None
    if not form.is_complete:
        raise InvalidRequestError("The form is incomplete: its last boundary is missing.")
    stream = _text(form, b"stream").lower() in ("true", "1", "yes", "on", "t", "y")
    return FormBody(model=_text(form, b"model") or None, stream=stream)


def _check_delimiters(body: bytes, delimiter: bytes) -> None:
    """Raise if a boundary is not a whole line, or there are too many.

    The parser is in Python and would take seconds for a body of repeated boundaries.
    """
    if not body.startswith(delimiter):
        raise InvalidRequestError("The form does not begin with its boundary.")
    position = len(delimiter)
    delimiter = b"\r\n" + delimiter
    for _ in range(MAX_PARTS + 1):  # the last one ends the form
        if body[position : position + 2] not in _DELIMITER_ENDS:
            raise InvalidRequestError(
                "The form is incomplete, or its boundary occurs in a value; choose another one."
            )
        start = body.find(delimiter, position)
        if start < 0:
            return
        position = start + len(delimiter)
    raise InvalidRequestError(f"The form has more than {MAX_PARTS} fields.")


def _text(form: _Form, name: bytes) -> str:
    try:
        return form.fields.get(name, b"").decode()
    except UnicodeDecodeError:  # Starlette would read Latin-1
        raise InvalidRequestError("The field is not UTF-8.", param=name.decode()) from None
