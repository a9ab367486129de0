"""The texts of a JSON document, such as the prompt in a request or the answer in a response.

All strings count except those of fields that hold no text, so that a text in a field of a newer API
is checked, too. Objects with names that a client or a model chooses, such as the arguments of a
tool, count whole: names, strings and numbers.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_JSON_LEVELS = 200
"""Levels of the objects that count whole."""
ROLES = frozenset({"assistant", "developer", "function", "system", "tool", "user"})
"""Roles of messages. Others could be texts: templates write a role into the prompt."""
REFERENCE_PARTS = frozenset({"prompt_embeds"})
"""Types of content parts that stand for a text without containing it."""

_JSON_STRINGS = frozenset({"arguments", "partial_json"})
_NOT_TEXT = frozenset(
    {
        *("audio", "cache_control", "call_id", "container", "created", "data", "detail"),
        *("encrypted_content", "file", "file_data", "file_id", "finish_reason", "format", "id"),
        *("image_url", "input_audio", "item_id", "logprobs", "media_type", "mime_type", "model"),
        *("object", "phase", "role", "server_label", "server_url", "signature", "source"),
        *("status", "stop_reason", "stop_sequence", "token_ids", "tool_call_id", "tool_use_id"),
        *("type", "usage", "uuid", "video_url"),
    }
)
"""Fields of the APIs' messages and content parts that are references, media or enumerations."""
_TEXT_SOURCES = ("content", "text")
_TOOL_RESULTS = ("function_call_output", "tool_result", "custom_tool_call_output")
_IDENTIFIER = re.compile(r"(?!(?:[^0-9]*[0-9]){9})[A-Za-z_][\w.:/-]{0,127}", re.ASCII)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(slots=True)
class TextSlot:
    """A string in a JSON document."""

    container: Any
    """Object or list that holds it."""
    key: str | int
    role: str
    """Role of its message; `tool` in results of tools; empty if unknown."""

    @property
    def text(self) -> str:
        return str(self.container[self.key])

    @text.setter
    def text(self, text: str) -> None:
        self.container[self.key] = text


@dataclass(slots=True)
class DocumentTexts:
    """Texts at several places of a document. ``write`` once they are changed."""

    slots: list[TextSlot] = field(default_factory=list)
    """The texts, in order."""
    unknown: list[str] = field(default_factory=list)
    """Roles and types of parts with a content that is not known."""
    known: Mapping[str, str] = field(default_factory=dict)
    """Texts that were checked before, with what replaces them at once."""
    _values: "list[_JsonValue]" = field(default_factory=list)

    def add(self, container: Any, key: str | int, role: str = "") -> None:
        """Add the texts at and below an item of a JSON object or list.

        Args:
            container: The object or list.
            key: Name or index of the item.
            role: Role of the texts.

        Raises:
            ValueError: An object has more than ``MAX_JSON_LEVELS`` levels.
        """
        # Not recursive: a router accepts more levels than Python's stack would take.
        stack: list[tuple[Any, str | int, str]] = [(container, key, role)]
        while stack:
            container, key, role = stack.pop()
            value = container[key]
            if isinstance(value, str) and value in self.known:
                container[key] = self.known[value]
            elif key in _JSON_STRINGS or (key == "input" and isinstance(value, dict)):
                self.add_json(container, key, role)
            elif isinstance(value, str):
                if value:
                    self.slots.append(TextSlot(container, key, role))
            elif isinstance(value, list):
                stack += ((value, index, role) for index in reversed(range(len(value))))
            elif isinstance(value, dict):
                kind = value.get("type")
                if kind in _TOOL_RESULTS:
                    role = "tool"
                if kind in REFERENCE_PARTS:
                    self.unknown.append(f"a part of the type `{kind}`")
                names = [name for name in value if _is_text(value, name)]
                stack += ((value, name, role) for name in reversed(names))

    def add_messages(self, container: Any, key: str) -> None:
        """Add the texts of a list of messages, each of which has a role."""
        messages = container[key]
        if not isinstance(messages, list):
            self.add(container, key)
            return
        for index, message in enumerate(messages):
            role = message.get("role") if isinstance(message, dict) else None
            role = role if isinstance(role, str) else ""
            if role and role not in ROLES:
                self.unknown.append(f"the role `{role[:20]}`")
            self.add(messages, index, role)
            if isinstance(message, dict) and not _is_text(message, "name"):
                self.slots.append(TextSlot(message, "name", role))  # templates write it

    def add_json(self, container: Any, key: str | int, role: str = "") -> None:
        """Add all names, strings and numbers of a JSON value, or of a string with one.

        Raises:
            ValueError: See ``add``.
        """
        if container[key] in ("", None):
            return
        value = _JsonValue(container, key)
        self._values.append(value)
        self.slots += (TextSlot(value.texts, index, role) for index in range(len(value.texts)))

    def write(self) -> None:
        """Write the changed parts of ``add_json`` into the document."""
        for value in self._values:
            value.write()


def find_texts(container: Any, key: str | int) -> DocumentTexts:
    """Return the texts at and below an item of a JSON object or list; see ``DocumentTexts``."""
    found = DocumentTexts()
    found.add(container, key)
    return found


def _is_text(container: dict[str, Any], name: str) -> bool:
    value = container.get(name)
    if name == "name":  # of a tool
        return not (isinstance(value, str) and _IDENTIFIER.fullmatch(value))
    if name == "data":
        return container.get("type") in _TEXT_SOURCES
    if name == "source" and isinstance(value, dict):
        return value.get("type") in _TEXT_SOURCES
    return name not in _NOT_TEXT


class _JsonValue:
    """A JSON value, or a string with one, as a list of its texts."""

    def __init__(self, container: Any, key: str | int) -> None:
        self._container, self._key = container, key
        self._value = container[key]
        self._is_encoded = isinstance(self._value, str)
        self._is_json = True
        if self._is_encoded:
            try:
                self._value = json.loads(self._value, object_pairs_hook=_unique)
            except (ValueError, RecursionError):
                # Parsers refuse it, but a model or a person may read it.
                self._is_json, self._value = False, _unescape(self._value)
        self.texts: list[str] = []
        _map_json(self._value, self._collect)
        self._known = list(self.texts)

    def _collect(self, text: str) -> str:
        self.texts.append(text)
        return text

    def write(self) -> None:
        """Put the value with its changed texts into the document."""
        if self.texts == self._known:
            return
        texts = iter(self.texts)
        value = _map_json(self._value, lambda _: next(texts))
        if self._is_encoded and self._is_json:
            value = json.dumps(value, ensure_ascii=False)
        self._container[self._key] = value


def _map_json(value: Any, change: Callable[[str], str], level: int = 0) -> Any:
    """Return a JSON value with changed names, strings and numbers."""
    if level > MAX_JSON_LEVELS:
        raise ValueError(f"more than {MAX_JSON_LEVELS} levels of objects")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): _map_json(item, change, level + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_map_json(item, change, level + 1) for item in value]
    if value is None or isinstance(value, bool):
        return value
    number = json.dumps(value)
    changed = change(number)
    return value if changed == number else changed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; raise ValueError if it would hide one of two fields with the same name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two fields have the same name")
    return found


def _unescape(text: str) -> str:
    def char_of(found: re.Match[str]) -> str:
        return chr(int(found[1], 16)) if found[1] else _ESCAPED.get(found[2], found[2])

    return _ESCAPE.sub(char_of, text)


def remove_fields(document: Any, names: frozenset[str]) -> None:
    """Empty all fields with these names, at any level: lists become `[]`, others null.

    Descriptions and arguments of tools may have fields of any name, which stay.
    """
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        elif isinstance(value, dict):
            for name, item in value.items():
                if name in names:
                    value[name] = [] if isinstance(item, list) else None
                elif name != "tools" and not (name == "input" and isinstance(item, dict)):
                    stack.append(item)
