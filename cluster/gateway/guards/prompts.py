"""The texts of prompts: fields of the APIs' requests that an engine writes into a prompt."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cluster.errors import InvalidRequestError
from cluster.guards import DocumentTexts

FieldKind = Literal["text", "system", "messages", "json"]

PROMPT_FIELDS: Mapping[str, Mapping[str, FieldKind]] = {
    "/v1/chat/completions": {
        "messages": "messages",
        "documents": "json",
        "chat_template": "system",
        "chat_template_kwargs": "json",
    },
    "/v1/completions": {"prompt": "text", "suffix": "text"},
    "/v1/responses": {
        "instructions": "system",
        "previous_input_messages": "json",
        "input": "messages",
        "prompt": "json",
        "chat_template_kwargs": "json",
    },
    "/v1/messages": {
        "system": "system",
        "messages": "messages",
        "chat_template_kwargs": "json",
    },
}
"""Fields with parts of the prompt, by path, and how to read them."""
MAX_PROMPT_CHARS = 4 * 1024 * 1024
"""Length of the longest prompt that is checked; a thread searches 10 to 0.5 million per second."""


class Prompt(NamedTuple):
    """The texts of one prompt."""

    texts: DocumentTexts
    unreadable: list[str]
    """Parts that guards cannot read."""


def read_prompt(path: str, document: dict[str, Any]) -> Prompt:
    """Return the texts of a request's prompt.

    Raises:
        InvalidRequestError: The document has too many levels.
    """
    texts = DocumentTexts()
    try:
        for name, kind in PROMPT_FIELDS[path].items():
            if name not in document:
                continue
            if kind == "messages":
                texts.add_messages(document, name)
            elif kind == "json":
                texts.add_json(document, name)
            else:
                texts.add(document, name, "system" if kind == "system" else "")
    except ValueError as error:
        raise InvalidRequestError(f"Guards cannot check the prompt: {error}.") from None
    unreadable = list(texts.unknown)
    if sum(len(slot.text) for slot in texts.slots) > MAX_PROMPT_CHARS:
        unreadable.append(f"a prompt of more than {MAX_PROMPT_CHARS} characters")
    prompt = document.get("prompt")
    if path == "/v1/completions" and (
        document.get("prompt_embeds") is not None
        or (isinstance(prompt, list) and not all(isinstance(each, str) for each in prompt))
    ):
        unreadable.append("a prompt of token ids or embeddings")
    return Prompt(texts, unreadable)
