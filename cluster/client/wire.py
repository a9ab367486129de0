"""The bodies that the client sends and how it reads the answers. Pure; knows nothing of Ray."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cluster.client.results import (
    Candidate,
    Classification,
    Completion,
    Delta,
    Embedding,
    Entity,
    LabelScore,
    Ranked,
    Usage,
)
from cluster.errors import InternalError, RequestError, request_error_for

Message = Mapping[str, Any]
Conversation = str | Sequence[Message]


def encode(body: Mapping[str, Any]) -> bytes:
    """The JSON form of a body, without what was left at None."""
    return json.dumps({key: value for key, value in body.items() if value is not None}).encode()


def messages(conversation: Conversation) -> list[Message]:
    """Chat messages; a bare text is what the user says."""
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    return list(conversation)


def decode(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Any:
    """The JSON answer.

    Raises:
        RequestError: the typed error that the answer carries.
    """
    if status != 200:
        raise error_from(status, headers, body)
    return json.loads(body)


def error_from(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> RequestError:
    """The typed error of an answer that is not a success."""
    try:
        said = json.loads(body)["error"]
        message, param = str(said["message"]), said.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = body.decode(errors="replace") or f"HTTP {status}", None
    error = request_error_for(status, message, param)
    retry = next((value for name, value in headers if name.lower() == b"retry-after"), b"")
    if retry.isdigit():
        error.retry_after_s = float(retry)
    return error


def completions(answer: Mapping[str, Any]) -> list[Completion]:
    """One ``Completion`` for each choice of a chat or completions answer, in order."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [
        Completion(
            text=choice["text"] if "text" in choice else choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            model=answer["model"],
            id=answer["id"],
            usage=_usage(answer["usage"]),
        )
        for choice in choices
    ]


def classifications(answer: Mapping[str, Any]) -> list[Classification]:
    """One ``Classification`` for each text, in order."""
    rows = sorted(answer["data"], key=lambda row: row["index"])
    return [
        Classification(
            label=row["label"],
            score=row["score"],
            scores=tuple(LabelScore(score["label"], score["score"]) for score in row["scores"]),
        )
        for row in rows
    ]


def embeddings(answer: Mapping[str, Any]) -> list[Embedding]:
    """One ``Embedding`` for each text, in order."""
    rows = sorted(answer["data"], key=lambda row: row["index"])
    return [Embedding(tuple(row["embedding"])) for row in rows]


def entities(answer: Mapping[str, Any]) -> list[list[Entity]]:
    """The entities of each text, in order."""
    rows = sorted(answer["data"], key=lambda row: row["index"])
    return [[Entity(**entity) for entity in row["entities"]] for row in rows]


def scores(answer: Mapping[str, Any]) -> list[float]:
    """The score of each pair, in order."""
    return [row["score"] for row in sorted(answer["data"], key=lambda row: row["index"])]


def rankings(answer: Mapping[str, Any]) -> list[Ranked]:
    """The documents, the most relevant first."""
    return [Ranked(row["index"], row["relevance_score"]) for row in answer["results"]]


def candidates(answer: Mapping[str, Any]) -> list[list[list[Candidate]]]:
    """For each text, in order, the candidates of each of its masks."""
    rows = sorted(answer["data"], key=lambda row: row["index"])
    return [
        [[Candidate(one["token_str"], one["score"]) for one in mask] for mask in row["masks"]]
        for row in rows
    ]


def _usage(usage: Mapping[str, Any]) -> Usage:
    return Usage(usage["prompt_tokens"], usage.get("completion_tokens") or 0)


class DeltaReader:
    """Turns the bytes of an event stream, cut anywhere, into ``Delta``s."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[Delta]:
        """The pieces that ``chunk`` completes.

        Raises:
            RequestError: the stream says that the request failed.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield from _deltas(event(line[6:]))


def event(data: str | bytes) -> Any:
    """The JSON of one server-sent event.

    Raises:
        RequestError: it says that the request failed.
    """
    said = json.loads(data)
    if error := said.get("error"):
        code, message = error.get("code"), str(error.get("message"))
        raise request_error_for(code, message) if isinstance(code, int) else InternalError(message)
    return said


def _deltas(event: Mapping[str, Any]) -> Iterator[Delta]:
    usage = _usage(event["usage"]) if event.get("usage") else None
    for choice in event["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        if text or choice["finish_reason"]:
            yield Delta(text or "", choice["finish_reason"])
    if usage is not None:
        yield Delta("", usage=usage)
