"""Reading of an uploaded file: a form is parsed piece by piece, and the file goes to disk."""

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from cluster.errors import InvalidRequestError, PayloadTooLargeError
from cluster.gateway.batches.threads import BatchThreads
from cluster.gateway.messages import BodyStream
from cluster.gateway.multipart import FormReader, form_options

MAX_FIELD_BYTES = 4096
MAX_FIELDS = 20
WRITE_BYTES = 256 * 1024
"""Received data that a thread writes at once."""


@dataclass(slots=True)
class Upload:
    """Fields of a form with one file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    num_bytes: int = 0
    has_file: bool = False


class _Form(FormReader):
    """Reader that gathers the fields, and the file until it is written."""

    def __init__(self, max_file_bytes: int) -> None:
        super().__init__()
        self.upload = Upload()
        self.unwritten = bytearray()
        self._max_file_bytes = max_file_bytes
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._is_file = False
        self._value = b""

    def _begin_part(self) -> None:
        self._headers, self._name, self._is_file, self._value = {}, "", False, b""

    def _keep_header(self, name: bytes, value: bytes) -> None:
        self._headers[name] = value

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == "file"
        if self._is_file:
            if self.upload.has_file:
                raise InvalidRequestError("Send one `file` per request.", param="file")
            self.upload.has_file = True
            self.upload.filename = options.get(b"filename", b"").decode(errors="replace")[:255]

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise InvalidRequestError(
                    f"The field is longer than {MAX_FIELD_BYTES} bytes.", param=self._name
                )
            return
        self.unwritten += data[start:end]
        self.upload.num_bytes += end - start
        if self.upload.num_bytes > self._max_file_bytes:
            raise PayloadTooLargeError(
                f"The file is larger than {self._max_file_bytes} bytes "
                "(router.batches.max_file_bytes). Split it.",
                param="file",
            )

    def _end_part(self) -> None:
        if not self._is_file:
            self.upload.fields[self._name] = self._value.decode(errors="replace")
            if len(self.upload.fields) > MAX_FIELDS:
                raise InvalidRequestError(f"The form has more than {MAX_FIELDS} fields.")


async def receive_form(
    stream: BodyStream,
    content_type: str | None,
    path: Path,
    max_file_bytes: int,
    threads: BatchThreads,
) -> Upload:
    """Write the ``file`` of a form to ``path``, and return its fields. Nothing is kept on errors.

    Raises:
        InvalidRequestError: The body is no form with one file.
        PayloadTooLargeError: The file is too large.
    """
    options = form_options(content_type)
    if options is None:
        raise InvalidRequestError("Send the file as multipart/form-data.", param="file")
    form = _Form(max_file_bytes)
    file = await threads.run(_create, path)
    try:
        try:
            parser = form.parser(options[b"boundary"])
            async for chunk in stream.chunks():
                parser.write(chunk)
                if len(form.unwritten) >= WRITE_BYTES:
                    data, form.unwritten = form.unwritten, bytearray()
                    await threads.run(file.write, bytes(data))
            parser.finalize()
        except MultipartParseError as error:
            raise InvalidRequestError(f"The form cannot be read: {error}.") from None
        if not (form.is_complete and form.upload.has_file):
            raise InvalidRequestError("The form has no complete `file`.", param="file")
        await threads.run(_finish, file, bytes(form.unwritten))
    except BaseException:
        os.unlink(path)
        with suppress(OSError):  # a full disk
            file.close()
        raise
    return form.upload


def _create(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path.open("wb")


def _finish(file: IO[bytes], rest: bytes) -> None:
    with file:
        file.write(rest)
        file.flush()
        os.fsync(file.fileno())
