"""The texts of a JSON document, such as the prompt in a request or the answer in a response.

All strings count except those of fields that hold no text, so that a text in a field of a newer API
is checked, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_JSON_FIELDS = frozenset({"arguments", "partial_json"})
_NOT_TEXT = frozenset(
    {
        *("audio", "cache_control", "call_id", "container", "created", "data", "detail"),
        *("encrypted_content", "file", "file_data", "file_id", "finish_reason", "format", "id"),
        *("image_url", "input_audio", "item_id", "logprobs", "media_type", "mime_type", "model"),
        *("name", "object", "phase", "role", "server_label", "server_url", "signature", "source"),
        *("status", "stop_reason", "stop_sequence", "token_ids", "tool_call_id", "tool_use_id"),
        *("type", "usage", "uuid", "video_url"),
    }
)
"""Fields of the APIs' messages and content parts that are references, media or enumerations."""
_TOOL_RESULTS = ("function_call_output", "tool_result", "custom_tool_call_output")


@dataclass(slots=True)
class TextSlot:
    """A string in a JSON document."""

    container: Any
    """Object or list that holds it."""
    key: str | int
    role: str
    """Role of its message; `tool` in results of tools; empty if unknown."""
    is_json: bool
    """True if the string is itself JSON."""

    @property
    def text(self) -> str:
        return str(self.container[self.key])

    @text.setter
    def text(self, text: str) -> None:
        self.container[self.key] = text


def find_texts(container: Any, key: str | int, role: str = "") -> Iterator[TextSlot]:
    """Yield the texts at and below an item of a JSON object or list, in order.

    Args:
        container: The object or list.
        key: Name or index of the item.
        role: Role of texts that are in no message.
    """
    # Not recursive: a router accepts more levels than Python's stack would take with generators.
    stack: list[tuple[Any, str | int, str, bool]] = [(container, key, role, False)]
    while stack:
        container, key, role, is_free = stack.pop()
        value = container[key]
        if isinstance(value, str):
            if value:
                yield TextSlot(container, key, role, key in _JSON_FIELDS)
        elif isinstance(value, list):
            stack += ((value, index, role, is_free) for index in reversed(range(len(value))))
        elif isinstance(value, dict):
            inner = _role_of(value, role)
            # The arguments of a tool (`tool_use.input`) may have fields of any name.
            is_free = is_free or (key == "input" and container.get("type") == "tool_use")
            names = [name for name in value if is_free or name not in _NOT_TEXT]
            stack += ((value, name, inner, is_free) for name in reversed(names))


def _role_of(value: dict[str, Any], role: str) -> str:
    if value.get("type") in _TOOL_RESULTS:
        return "tool"
    own = value.get("role")
    return own if isinstance(own, str) else role
