"""Places of the texts in the streams of each API, and events that end a blocked answer."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

Event = dict[str, Any]
Key = tuple[Hashable, ...]
"""Name of one text of an answer; its first item is the part of the answer that it belongs to."""

TOKEN_FIELDS = frozenset({"input_messages", "logprobs", "output_messages", "token_ids"})
"""Fields that show the texts of an answer a second time, as tokens."""
REFUSAL = "The answer was blocked by a guard."


class Delta(NamedTuple):
    """The next part of a text in an event."""

    key: Key
    container: dict[str, Any]
    field: str
    is_json: bool = False


class StreamFormat(ABC):
    """Format of the events of one API."""

    @abstractmethod
    def deltas(self, event: Event) -> Iterable[Delta]:
        """Yield the parts of texts in an event, in order."""

    @abstractmethod
    def ends(self, event: Event, key: Key) -> bool:
        """Return True if no further part of a text follows."""

    def is_followed(self, key: Key, other: Key) -> bool:
        """Return True if a text precedes another one, whose part is the next event."""
        return False

    @abstractmethod
    def tail(self, event: Event, key: Key, text: str) -> Event:
        """Return the event with the last part of a text, for the client before ``event``."""

    @abstractmethod
    def blocked(self) -> list[Event]:
        """Return the events that end an answer in the place of those that follow."""

    def passed(self, event: Event) -> None:  # noqa: B027, optional
        """Note an event that the client gets."""


class ChoicesFormat(StreamFormat):
    """OpenAI's chat and completions."""

    def __init__(self) -> None:
        self._base: Event = {}
        self._open: dict[int, None] = {}

    def deltas(self, event: Event) -> Iterable[Delta]:
        choices = event.get("choices")
        if not isinstance(choices, list):
            return
        if choices:
            self._base = {k: v for k, v in event.items() if k not in ("choices", "usage")}
        for choice in choices:
            index = choice.get("index", 0)
            self._open[index] = None
            yield from self._of_choice(index, choice)

    def _of_choice(self, index: int, choice: Event) -> Iterable[Delta]:
        if isinstance(choice.get("text"), str):
            yield Delta((index, "text"), choice, "text")
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return
        for name, value in delta.items():
            if isinstance(value, str) and name not in ("role", "name"):
                yield Delta((index, name), delta, name)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if isinstance(function.get("arguments"), str):
                key = (index, "tool_calls", call.get("index", 0))
                yield Delta(key, function, "arguments", is_json=True)

    def ends(self, event: Event, key: Key) -> bool:
        return any(
            choice.get("index", 0) == key[0] and choice.get("finish_reason") is not None
            for choice in event.get("choices") or ()
        )

    def is_followed(self, key: Key, other: Key) -> bool:
        return key[0] == other[0] and key != other

    def tail(self, event: Event, key: Key, text: str) -> Event:
        index, name, *call = key
        if name == "text":
            return self._event(index, {"text": text}, None)
        delta: Event = {name: text}  # type: ignore[dict-item]
        if call:
            delta = {"tool_calls": [{"index": call[0], "function": {"arguments": text}}]}
        return self._event(index, {"delta": delta}, None)

    def blocked(self) -> list[Event]:
        is_chat = "chat" in str(self._base.get("object", "chat"))
        content: Event = {"delta": {}} if is_chat else {"text": ""}
        return [self._event(index, content, "content_filter") for index in self._open or (0,)]

    def _event(self, index: Hashable, content: Event, reason: str | None) -> Event:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return {**self._base, "choices": [choice]}

    def passed(self, event: Event) -> None:
        for choice in event.get("choices") or ():
            if choice.get("finish_reason") is not None:
                self._open.pop(choice.get("index", 0), None)


class MessagesFormat(StreamFormat):
    """Anthropic's messages."""

    _FIELDS: Mapping[str, str] = {
        "text_delta": "text",
        "thinking_delta": "thinking",
        "input_json_delta": "partial_json",
    }

    def __init__(self) -> None:
        self._open: dict[Hashable, None] = {}
        self._kinds: dict[Hashable, str] = {}
        self._num_deltas = 0

    def deltas(self, event: Event) -> Iterable[Delta]:
        kind, index = event.get("type"), event.get("index")
        if kind == "content_block_start":
            block = event.get("content_block") or {}
            if isinstance(block.get("text"), str):
                yield Delta((index,), block, "text")
        elif kind == "content_block_delta":
            delta = event["delta"]
            self._num_deltas += 1
            self._kinds[index] = delta["type"]
            if (name := self._FIELDS.get(delta["type"])) is not None:
                yield Delta((index,), delta, name, is_json=name == "partial_json")

    def passed(self, event: Event) -> None:
        if event.get("type") == "content_block_start":
            self._open[event.get("index")] = None
        elif event.get("type") == "content_block_stop":
            self._open.pop(event.get("index"), None)

    def ends(self, event: Event, key: Key) -> bool:
        return event.get("type") == "content_block_stop" and event.get("index") == key[0]

    def tail(self, event: Event, key: Key, text: str) -> Event:
        kind = self._kinds.get(key[0], "text_delta")
        delta = {"type": kind, self._FIELDS.get(kind, "text"): text}
        return {"type": "content_block_delta", "index": key[0], "delta": delta}

    def blocked(self) -> list[Event]:
        stops = [{"type": "content_block_stop", "index": index} for index in self._open]
        delta = {"stop_reason": "refusal", "stop_sequence": None}
        # The engine's count comes with its last event; each delta has at least one token.
        usage = {"output_tokens": self._num_deltas}
        return [
            *stops,
            {"type": "message_delta", "delta": delta, "usage": usage},
            {"type": "message_stop"},
        ]


class ResponsesFormat(StreamFormat):
    """OpenAI's responses."""

    _FULL: tuple[str, ...] = ("text", "arguments", "refusal", "input", "code", "transcript")

    def __init__(self) -> None:
        self._response: Event = {}
        self._last: dict[Key, Event] = {}

    def deltas(self, event: Event) -> Iterable[Delta]:
        if isinstance(event.get("response"), dict):
            self._response = event["response"]
        if str(event.get("type")).endswith(".delta") and isinstance(event.get("delta"), str):
            key = self._key(event)
            self._last[key] = event
            yield Delta(key, event, "delta", is_json="arguments" in event["type"])

    def _key(self, event: Event) -> Key:
        base = str(event["type"]).rpartition(".")[0]
        return (
            *(base, event.get("output_index"), event.get("content_index")),
            *(event.get("summary_index"), event.get("item_id")),
        )

    def ends(self, event: Event, key: Key) -> bool:
        return str(event.get("type")).endswith(".done") and self._key(event) == key

    def tail(self, event: Event, key: Key, text: str) -> Event:
        tail = {**self._last[key], "delta": text}
        return {**tail, "logprobs": []} if "logprobs" in tail else tail

    def full_field(self, event: Event) -> str | None:
        """Return the field with the whole text of an event that ends one."""
        return next((name for name in self._FULL if isinstance(event.get(name), str)), None)

    def blocked(self) -> list[Event]:
        details = {"incomplete_details": {"reason": "content_filter"}}
        response = {**self._response, "status": "incomplete", **details, "output": []}
        return [{"type": "response.incomplete", "sequence_number": 0, "response": response}]


FORMATS: Mapping[str, Callable[[], StreamFormat]] = {
    "/v1/chat/completions": ChoicesFormat,
    "/v1/completions": ChoicesFormat,
    "/v1/messages": MessagesFormat,
    "/v1/responses": ResponsesFormat,
}


def encode_event(event: Event, *, is_named: bool) -> bytes:
    """Return an event of a stream; ``is_named`` adds the line with its type."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {event['type']}\n" if is_named and "type" in event else ""
    return f"{name}data: {data}\n\n".encode(errors="replace")


def answer_roots(path: str, document: Event) -> list[tuple[Event, str]]:
    """Return the fields of a complete answer that contain its texts."""
    if path == "/v1/responses":
        return [(document, "output")] if "output" in document else []
    if path == "/v1/messages":
        return [(document, "content")] if "content" in document else []
    choices = document.get("choices") or []
    name = "message" if path == "/v1/chat/completions" else "text"
    return [(choice, name) for choice in choices if name in choice]


def block_document(path: str, document: Event, root: Event) -> None:
    """Remove the texts of a complete answer: those of one choice, or all of them."""
    if path == "/v1/responses":
        details = {"reason": "content_filter"}
        document |= {"status": "incomplete", "incomplete_details": details, "output": []}
    elif path == "/v1/messages":
        document |= {"content": [], "stop_reason": "refusal", "stop_sequence": None}
    else:
        root |= {"finish_reason": "content_filter", "logprobs": None, "token_ids": None}
        if path == "/v1/completions":
            root["text"] = ""
        else:
            root["message"] = {"role": "assistant", "content": None, "refusal": REFUSAL}
