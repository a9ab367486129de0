"""Lines of batches: reading and validation of the input, and the lines of the results."""

from collections.abc import Callable, Collection, Iterator
from typing import IO, Any, NamedTuple

import msgspec

from cluster.batches.types import LineError
from cluster.usage import Usage

MAX_ERRORS = 100
"""Errors of one file that are reported."""
MAX_ID_CHARS = 512
CHUNK_BYTES = 1024 * 1024
"""Input that is read at once; one line may be longer."""

OpenFile = Callable[[], IO[bytes]]


class BatchLine(msgspec.Struct, frozen=True):
    """One request of a batch."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct, frozen=True):
    model: str | None = None
    stream: bool | None = None


class LineResult(NamedTuple):
    """Result of one line."""

    line: int
    """Number of the line, from 1."""
    is_success: bool
    content: bytes
    """Line of the output file, or of the error file, without its end."""
    usage: Usage | None = None


_decode_line = msgspec.json.Decoder(BatchLine).decode
_decode_body = msgspec.json.Decoder(_Body).decode
_encode = msgspec.json.Encoder().encode


def parse_line(content: bytes) -> BatchLine:
    """Return a line that ``check_lines`` has accepted."""
    return _decode_line(content)


def model_of(line: BatchLine) -> str | None:
    """Return the model that the request names."""
    return _decode_body(line.body).model


def _numbered_lines(open_file: OpenFile, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    with open_file() as file:
        number = 0
        while line := file.readline(max_bytes + 2):
            number += 1
            if line.strip():
                yield number, line
            if len(line) > max_bytes + 1:  # the rest belongs to the same line
                return


def check_lines(
    open_file: OpenFile, endpoint: str, models: Collection[str], max_lines: int, max_bytes: int
) -> tuple[int, list[LineError]]:
    """Return the number of lines of an input file, and their errors.

    Args:
        open_file: Opens the file.
        endpoint: Path that every line must request.
        models: Models that exist and that the tenant may use.
        max_lines: Maximum number of lines.
        max_bytes: Maximum size of a line.
    """
    errors: list[LineError] = []
    seen: set[str] = set()
    num = 0
    for number, content in _numbered_lines(open_file, max_bytes):
        num += 1
        if num > max_lines:
            message = f"The file has more than {max_lines} requests. Split it."
            errors.append(LineError("too_many_requests", message, number))
            break
        checked = _check_line(number, content, endpoint, models, max_bytes)
        if isinstance(checked, LineError):
            errors.append(checked)
        elif checked in seen:
            message = f"The custom_id {checked!r} is used twice."
            errors.append(LineError("duplicate_custom_id", message, number, "custom_id"))
        else:
            seen.add(checked)
        if len(errors) >= MAX_ERRORS:
            break
    if not num:
        errors.append(LineError("empty_file", "The file has no requests."))
    return num, errors


def _check_line(
    number: int, content: bytes, endpoint: str, models: Collection[str], max_bytes: int
) -> LineError | str:
    """Return the line's ``custom_id``, or its error."""
    if len(content) > max_bytes + 1:
        message = f"The line is longer than {max_bytes} bytes (router.max_body_bytes)."
        return LineError("line_too_long", message, number)
    try:
        line = _decode_line(content)
        body = _decode_body(line.body)
        msgspec.json.decode(line.body)
    except msgspec.ValidationError as error:
        return LineError("invalid_request", f"The line is no request: {error}.", number)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return LineError("invalid_json_line", f"The line is not valid JSON: {error}.", number)
    if not 0 < len(line.custom_id) <= MAX_ID_CHARS:
        message = f"custom_id must have 1 to {MAX_ID_CHARS} characters."
        return LineError("invalid_custom_id", message, number, "custom_id")
    if line.method != "POST":
        return LineError("invalid_method", "method must be POST.", number, "method")
    if line.url != endpoint:
        message = f"url must be {endpoint}, the endpoint of the batch."
        return LineError("mismatched_endpoint", message, number, "url")
    if body.stream:
        message = "Answers of a batch cannot be streamed; remove stream."
        return LineError("invalid_request", message, number, "body.stream")
    if body.model is not None and body.model not in models:
        message = f"The model {body.model[:80]!r} does not exist, or the key does not allow it."
        return LineError("model_not_found", message, number, "body.model")
    return line.custom_id


class LineReader:
    """Lines of an input file that have no result yet, in order."""

    def __init__(self, open_file: OpenFile, done: Collection[int], max_bytes: int) -> None:
        self._lines = _numbered_lines(open_file, max_bytes)
        self._done = done

    def read(self) -> list[tuple[int, bytes]]:
        """Return the next lines with their numbers; none at the end."""
        found: list[tuple[int, bytes]] = []
        size = 0
        for number, content in self._lines:
            if number in self._done:
                continue
            found.append((number, content))
            size += len(content)
            if size >= CHUNK_BYTES:
                break
        return found


def result_line(custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """Return the line of an answer.

    Args:
        custom_id: The request's.
        status: HTTP status.
        request_id: Id of the request in the logs.
        body: JSON of the answer.
    """
    # A line break is legal between JSON's tokens only, where a space is as good.
    content: Any = msgspec.Raw(body.replace(b"\r", b" ").replace(b"\n", b" "))
    if not body.lstrip().startswith((b"{", b"[")):
        content = body.decode(errors="replace")
    response = {"status_code": status, "request_id": request_id, "body": content}
    fields = {"id": f"batch_req_{request_id}", "custom_id": custom_id}
    return _encode({**fields, "response": response, "error": None})


def error_line(custom_id: str, request_id: str, code: str, message: str) -> bytes:
    """Return the line of a request that was not answered."""
    error = {"code": code, "message": message}
    fields = {"id": f"batch_req_{request_id}", "custom_id": custom_id}
    return _encode({**fields, "response": None, "error": error})
