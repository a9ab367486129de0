"""Callbacks of the parser of multipart forms: the boundary, and the headers of each part."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from python_multipart.multipart import MultipartParser, parse_options_header


class FormReader(ABC):
    """Callbacks of the parser, which get offsets in the data."""

    def __init__(self) -> None:
        self.is_complete = False
        self._header_name = self._header_value = b""

    def parser(self, boundary: bytes) -> MultipartParser:
        """Return a parser that calls this reader."""
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        return MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    @abstractmethod
    def _begin_part(self) -> None: ...

    @abstractmethod
    def _keep_header(self, name: bytes, value: bytes) -> None:
        """Take a header of the part; the name is in lower case."""

    @abstractmethod
    def _end_headers(self) -> None: ...

    @abstractmethod
    def _add_data(self, data: bytes, start: int, end: int) -> None: ...

    def _end_part(self) -> None:
        return

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        name, value = self._header_name.lower(), self._header_value
        self._header_name = self._header_value = b""
        self._keep_header(name, value)

    def _end(self) -> None:
        self.is_complete = True


def form_options(content_type: str | None) -> dict[bytes, bytes] | None:
    """Return the options of a form's content type, with a boundary; None for other types."""
    kind, options = parse_options_header(content_type)
    return options if kind == b"multipart/form-data" and options.get(b"boundary") else None
