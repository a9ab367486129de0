"""Paths of a classifier: which body belongs to which task, and in which API's format.

A path may have several formats. The usual one is tried first, so that others cost it nothing; if
its schema does not fit, the fields of the body decide.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from msgspec import DecodeError, Raw, Struct, ValidationError
from msgspec.json import Decoder

from cluster.engines.classifier.serving.tasks.base import Task
from cluster.engines.classifier.serving.tools.base import Tool
from cluster.engines.classifier.serving.vectors import VectorRequest
from cluster.errors import InvalidRequestError

Fields = Mapping[str, Raw]
"""Top-level fields of a body."""
Marks = Callable[[Fields], bool]

MAX_NAMED_FIELDS = 10
MAX_NAME_CHARS = 50
_decode_fields = Decoder(dict[str, Raw]).decode
_NOT_PRINTABLE = re.compile(r"[^ -~]")


@dataclass(frozen=True, slots=True)
class Translation:
    """Format of another API for a task."""

    api: str
    """Name of the API, for the OpenAPI document."""
    paths: tuple[str, ...]
    task: type[Task[Any]]
    request: type[Struct]
    response: Any
    to_request: Callable[[Any], Any]
    """Makes the task's request from a body."""
    to_reply: Callable[[Any, Any, Task[Any]], Any]
    """Makes the reply from the body and the task's reply."""
    marks: Marks | None = None
    """Recognizes its bodies on a path that several formats share; None: all others."""
    is_slow: bool = False
    """True if ``to_reply`` runs in a thread."""


def has_field(name: str) -> Marks:
    return lambda fields: name in fields


class Endpoint:
    """A task, or a tool, behind one format."""

    def __init__(self, handler: Task[Any] | Tool[Any], translation: Translation | None) -> None:
        self.handler = handler
        self.translation = translation
        self.request: type[Struct] = (translation or handler).request
        self.response: Any = (translation or handler).response
        self.marks = None if translation is None else translation.marks
        if isinstance(handler, Tool) and handler.marking_field is not None:
            self.marks = has_field(handler.marking_field)
        self.decode = Decoder(self.request).decode
        self.decode_strictly = Decoder(_forbid_unknown_fields(self.request)).decode
        self.field_names = frozenset(self.request.__struct_encode_fields__)

    @property
    def summary(self) -> str:
        api = "" if self.translation is None else f" ({self.translation.api})"
        return self.handler.summary + api


class Parsed(NamedTuple):
    """A body, and the endpoint whose format it has."""

    endpoint: Endpoint
    body: Any
    ignored: Sequence[str] = ()
    """Names of fields that the format does not have."""


class PathEndpoints:
    """All endpoints of one path."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = endpoints
        unmarked = (endpoint for endpoint in endpoints if endpoint.marks is None)
        self._usual = next(unmarked, endpoints[0])

    @property
    def method(self) -> str:
        return "POST" if isinstance(self._usual.handler, Task) else self._usual.handler.method

    @property
    def returns_bytes(self) -> bool:
        """True if a reply may be bytes instead of JSON."""
        return any(issubclass(endpoint.request, VectorRequest) for endpoint in self.endpoints)

    def parse(self, body: bytes) -> Parsed:
        """Parse a body by the format that it has.

        Raises:
            InvalidRequestError: It is not JSON, not UTF-8 (lone surrogates included), or a field is
                missing or of the wrong type.
        """
        try:
            return Parsed(self._usual, self._usual.decode_strictly(body))
        except ValidationError as error:
            return self._parse_by_fields(body, error)
        except UnicodeDecodeError:
            raise InvalidRequestError("the body is not valid UTF-8") from None
        except (DecodeError, RecursionError) as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}") from None

    def _parse_by_fields(self, body: bytes, error: ValidationError) -> Parsed:
        try:
            fields = _decode_fields(body)
        except (DecodeError, UnicodeDecodeError, RecursionError):
            raise _invalid_request_error(str(error)) from None
        marked = (e for e in self.endpoints if e.marks is not None and e.marks(fields))
        endpoint = next(marked, self._usual)
        try:
            request = endpoint.decode(body)
        except ValidationError as problem:
            raise _invalid_request_error(str(problem)) from None
        except RecursionError:
            raise InvalidRequestError("the body is nested too deeply") from None
        known = endpoint.field_names  # a set; sorting a million names would block the event loop
        return Parsed(endpoint, request, [name for name in fields if name not in known])


def warning_of(ignored: Sequence[str]) -> str:
    """Return the warning that names ignored fields, at most some of each length."""
    names = [_NOT_PRINTABLE.sub("?", name[:MAX_NAME_CHARS]) for name in ignored[:MAX_NAMED_FIELDS]]
    more = f" and {len(ignored) - len(names)} more" if len(ignored) > len(names) else ""
    return f"ignored unknown fields: {', '.join(names)}{more}"


def _forbid_unknown_fields(request: type[Struct]) -> type[Struct]:
    return msgspec.defstruct(
        request.__name__, [], bases=(request,), frozen=True, forbid_unknown_fields=True
    )


def _invalid_request_error(message: str) -> InvalidRequestError:
    """Translate msgspec's message, e.g. "Expected `str`, got `int` - at `$.input[1]`"."""
    problem, _, location = message.partition(" - at ")
    path = location.strip("`").removeprefix("$").lstrip(".")
    named = re.search(r"field `([^`]+)`", problem)
    param = path or (named[1] if named else None)
    text = f"{path}: {problem[0].lower()}{problem[1:]}" if path else problem
    return InvalidRequestError(text, param=param)
