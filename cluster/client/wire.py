"""Requests of the client as JSON bodies, and the parsing of the answers; no I/O and no Ray."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import uuid4

from pydantic import BaseModel

from cluster.client.results import (
    BatchState,
    Candidate,
    Classification,
    Completion,
    Delta,
    Embedding,
    Entity,
    LabelScore,
    Ranked,
)
from cluster.errors import InternalError, RequestError, request_error_for
from cluster.usage import Usage

TEXTS_PER_REQUEST = 1000
"""Texts per request; longer lists are split."""
PROMPTS_PER_REQUEST = 8
"""Prompts per request; longer lists are split, so that several replicas can share them."""
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATING_PATHS = (CHAT, COMPLETIONS)
"""Paths whose answers are sampled: a repetition must continue the same one."""

JSON = b"application/json"
"""Content type of requests."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Message = Mapping[str, Any]
Conversation = str | Sequence[Message]


# -- requests ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Upload:
    """File to send as a form, with other fields."""

    content: bytes
    filename: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One HTTP request and the parser of its answer."""

    path: str
    body: Mapping[str, Any] | None
    """JSON body of a POST; None: a GET."""
    parse: Callable[[Any], list[Any]]
    form: Upload | None = None
    """Form to send instead of ``body``."""
    is_file: bool = False
    """True if the answer is a file, whose bytes ``parse`` gets."""
    method: str | None = None
    """Method; None: POST with a body or a form, else GET."""


MODELS = ApiRequest("/v1/models", None, lambda answer: [card["id"] for card in answer["data"]])


def generate_requests(
    prompt: str | Sequence[str], model: str | None, sampling: Mapping[str, Any]
) -> list[ApiRequest]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    return [
        ApiRequest(COMPLETIONS, {"model": model, "prompt": part, **sampling}, completions)
        for part in _split(prompts, PROMPTS_PER_REQUEST)
    ]


def chat_request(
    conversation: Conversation, model: str | None, sampling: Mapping[str, Any]
) -> ApiRequest:
    body = {"model": model, "messages": messages(conversation), **sampling}
    return ApiRequest(CHAT, body, completions)


def stream_body(
    conversation: Conversation, model: str | None, sampling: Mapping[str, Any]
) -> bytes:
    """Return the body of a streamed chat whose last event holds the usage."""
    body = {"model": model, "messages": messages(conversation), **sampling}
    return encode({**body, "stream": True, "stream_options": {"include_usage": True}})


def text_requests(
    path: str,
    text: str | Sequence[str],
    options: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], list[Any]],
) -> list[ApiRequest]:
    """Return the requests that send one or many texts to a classifier."""
    texts = [text] if isinstance(text, str) else list(text)
    return [
        ApiRequest(path, {"input": part, **options}, parse)
        for part in _split(texts, TEXTS_PER_REQUEST)
    ]


def upload_request(lines: Iterable[Mapping[str, Any]]) -> ApiRequest:
    """Return the upload of a batch's requests."""
    content = b"\n".join(json.dumps(line).encode() for line in lines)
    form = Upload(content, "batch.jsonl", {"purpose": "batch"})
    return ApiRequest("/v1/files", None, lambda answer: [answer["id"]], form=form)


def batch_request(file_id: str, endpoint: str, hours: int) -> ApiRequest:
    """Return the creation of a batch."""
    window = f"{hours}h"
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window}
    return ApiRequest("/v1/batches", body, batch_state)


def file_request(file_id: str) -> ApiRequest:
    """Return the download of a file with one JSON object per line."""
    path = f"/v1/files/{file_id}/content"
    return ApiRequest(
        path, None, lambda content: [*map(json.loads, content.splitlines())], is_file=True
    )


def form(upload: Upload) -> tuple[bytes, bytes]:
    """Return the content type and the body of a form with a file."""
    boundary = uuid4().hex
    disposition = f"--{boundary}\r\nContent-Disposition: form-data; name="
    fields = "".join(
        f'{disposition}"{name}"\r\n\r\n{value}\r\n' for name, value in upload.fields.items()
    )
    # Browsers write names thus (HTML, "multipart form data").
    name = upload.filename.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    before = f'{fields}{disposition}"file"; filename="{name}"\r\n\r\n'
    body = b"".join((before.encode(), upload.content, f"\r\n--{boundary}--\r\n".encode()))
    return f"multipart/form-data; boundary={boundary}".encode(), body


def _split(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def messages(conversation: Conversation) -> list[Message]:
    """Return chat messages; a bare string is one user message."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    return list(conversation)


def encode(body: Mapping[str, Any]) -> bytes:
    """Return the JSON form of a body without its None values."""
    return json.dumps({key: value for key, value in body.items() if value is not None}).encode()


# -- answers ----------------------------------------------------------------------------------


def decode(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Any:
    """Return the JSON of an answer.

    Raises:
        RequestError: the answer is an error; the class matches its status.
    """
    if status != 200:
        raise error_from(status, headers, body)
    return json.loads(body)


def error_from(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> RequestError:
    try:
        error_body = json.loads(body)["error"]
        message, param = str(error_body["message"]), error_body.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = body.decode(errors="replace") or f"HTTP {status}", None
    error = request_error_for(status, message, param)
    retry = next((value for name, value in headers if name.lower() == b"retry-after"), b"")
    if retry.isdigit():
        error.retry_after_s = float(retry)
    return error


def completions(answer: Mapping[str, Any]) -> list[Completion]:
    """Return one ``Completion`` for each choice of a chat or completions answer, in order."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [
        Completion(
            text=choice["text"] if "text" in choice else choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            model=answer["model"],
            id=answer["id"],
            usage=usage_of(answer["usage"]),
        )
        for choice in choices
    ]


def classifications(answer: Mapping[str, Any]) -> list[Classification]:
    return [
        Classification(
            label=row["label"],
            score=row["score"],
            scores=tuple(LabelScore(score["label"], score["score"]) for score in row["scores"]),
        )
        for row in _rows(answer)
    ]


def embeddings(answer: Mapping[str, Any]) -> list[Embedding]:
    return [Embedding(tuple(row["embedding"])) for row in _rows(answer)]


def entities(answer: Mapping[str, Any]) -> list[list[Entity]]:
    return [[Entity(**entity) for entity in row["entities"]] for row in _rows(answer)]


def scores(answer: Mapping[str, Any]) -> list[float]:
    return [row["score"] for row in _rows(answer)]


def rankings(answer: Mapping[str, Any]) -> list[Ranked]:
    """Return the documents, most relevant first."""
    return [Ranked(row["index"], row["relevance_score"]) for row in answer["results"]]


def candidates(answer: Mapping[str, Any]) -> list[list[list[Candidate]]]:
    return [
        [[Candidate(one["token_str"], one["score"]) for one in mask] for mask in row["masks"]]
        for row in _rows(answer)
    ]


def batch_state(answer: Mapping[str, Any]) -> list[BatchState]:
    """Return the batch of an answer."""
    counts, cost = answer["request_counts"], answer["tandem"]
    errors = (answer["errors"] or {}).get("data", ())
    return [
        BatchState(
            id=answer["id"],
            status=answer["status"],
            num_lines=counts["total"],
            num_completed=counts["completed"],
            num_failed=counts["failed"],
            output_file_id=answer["output_file_id"],
            error_file_id=answer["error_file_id"],
            errors=tuple(f"line {error['line']}: {error['message']}" for error in errors),
            cost=cost["cost"],
        )
    ]


def _rows(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(answer["data"], key=lambda row: row["index"])


def usage_of(usage: Mapping[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
    )


# -- streams ----------------------------------------------------------------------------------


class EventReader(Generic[T]):
    """Incremental parser of an event stream, whose bytes may be cut anywhere.

    Args:
        parse: Yields what the JSON of one event means.
    """

    def __init__(self, parse: Callable[[Any], Iterator[T]]) -> None:
        self._parse = parse
        self._incomplete = b""

    def feed(self, chunk: bytes) -> Iterator[T]:
        """Yield the pieces of the answer that ``chunk`` completes.

        Raises:
            RequestError: the stream contains an error event.
        """
        *lines, self._incomplete = (self._incomplete + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield from self._parse(event(line[6:]))


class DeltaReader(EventReader[Delta]):
    """Parser of a streamed chat."""

    def __init__(self) -> None:
        super().__init__(_deltas)


def result_reader(result: type[M]) -> EventReader[str | M]:
    """Return the parser of a stream of pieces of text and, at its end, a result."""

    def parse(event: Mapping[str, Any]) -> Iterator[str | M]:
        if "delta" in event:
            yield event["delta"]
        elif "result" in event:
            yield result.model_validate(event["result"])

    return EventReader(parse)


def event(data: str | bytes) -> Any:
    """Return the JSON of one server-sent event.

    Raises:
        RequestError: the event is an error.
    """
    decoded = json.loads(data)
    if error := decoded.get("error"):
        code, message = error.get("code"), str(error.get("message"))
        raise request_error_for(code, message) if isinstance(code, int) else InternalError(message)
    return decoded


def _deltas(event: Mapping[str, Any]) -> Iterator[Delta]:
    usage = usage_of(event["usage"]) if event.get("usage") else None
    for choice in event["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        if text or choice["finish_reason"]:
            yield Delta(text or "", choice["finish_reason"])
    if usage is not None:
        yield Delta("", usage=usage)
