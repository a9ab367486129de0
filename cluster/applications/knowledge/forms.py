"""Forms with one uploaded file."""

from dataclasses import dataclass, field
from typing import cast, get_args

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from cluster.applications.knowledge.readers.files import File
from cluster.asgi import Receive, Scope
from cluster.errors import InvalidRequestError, PayloadTooLargeError
from cluster.tasks.knowledge import MediaType

FORM_BYTES = 64 * 1024
"""Part of a form that is not its file."""
MAX_FIELDS = 10


@dataclass(slots=True)
class Form:
    """Fields of a form and its file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    content: bytes | None = None

    def file(self) -> File:
        """Return the file; raise ``InvalidRequestError`` if it is missing, or its type is wrong."""
        if self.content is None:
            raise InvalidRequestError("The form has no `file`.", param="file")
        type_ = self.fields.get("type")
        if type_ is not None and type_ not in get_args(MediaType):
            allowed = ", ".join(get_args(MediaType))
            raise InvalidRequestError(f"type: expected one of {allowed}", param="type")
        return File(self.filename, self.content, cast("MediaType | None", type_))


class _Parts:
    """Callbacks of the parser."""

    def __init__(self) -> None:
        self.form = Form()
        self.is_complete = False
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._data = bytearray()

    def on_part_begin(self) -> None:
        self._disposition, self._data = b"", bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def on_part_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if name == "file":
            if self.form.content is not None:
                raise InvalidRequestError("Send one `file` per request.", param="file")
            self.form.filename = options.get(b"filename", b"").decode(errors="replace")
            self.form.content = bytes(self._data)
            return
        if len(self.form.fields) >= MAX_FIELDS:
            raise InvalidRequestError(f"The form has more than {MAX_FIELDS} fields.")
        self.form.fields[name] = self._data.decode(errors="replace")

    def on_end(self) -> None:
        self.is_complete = True

    def callbacks(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}


async def read_form(scope: Scope, receive: Receive, max_file_bytes: int) -> Form | None:
    """Return the form of a request; None if the client disconnected.

    Raises:
        InvalidRequestError: The body is no form.
        PayloadTooLargeError: It is too large.
    """
    headers = dict(scope["headers"])
    kind, options = parse_options_header(headers.get(b"content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequestError("Send the file as multipart/form-data.", param="file")
    parts = _Parts()
    num_bytes = 0
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > max_file_bytes + FORM_BYTES:
                raise PayloadTooLargeError(
                    f"The file is larger than {max_file_bytes} bytes "
                    "(applications.knowledge.max_file_bytes). Split it.",
                    param="file",
                )
            parser.write(chunk)
            if not message.get("more_body", False):
                break
        parser.finalize()
    except MultipartParseError as error:
        raise InvalidRequestError(f"The form cannot be read: {error}.") from None
    if not parts.is_complete:
        raise InvalidRequestError("The form is not complete.", param="file")
    return parts.form
