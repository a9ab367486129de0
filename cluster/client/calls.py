"""What the client asks: each method's arguments as requests to the application. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.client import wire

TEXTS_PER_REQUEST = 1000
"""A longer list of texts is sent in parts of so many."""
PROMPTS_PER_REQUEST = 8
"""A longer list of prompts is sent in parts of so many, which may go to several replicas."""
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Call:
    """One request and what becomes of its answer."""

    path: str
    body: Mapping[str, Any] | None
    """None: a GET."""
    parse: Callable[[Mapping[str, Any]], list[Any]]


MODELS = Call("/v1/models", None, lambda answer: [card["id"] for card in answer["data"]])


def generate_calls(
    prompt: str | Sequence[str], model: str | None, sampling: Mapping[str, Any]
) -> list[Call]:
    """Prompts to continue, in parts."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    parts = [
        prompts[at : at + PROMPTS_PER_REQUEST] for at in range(0, len(prompts), PROMPTS_PER_REQUEST)
    ]
    return [
        Call("/v1/completions", {"model": model, "prompt": part, **sampling}, wire.completions)
        for part in parts
    ]


def chat_call(
    conversation: wire.Conversation, model: str | None, sampling: Mapping[str, Any]
) -> Call:
    """A conversation to answer."""
    body = {"model": model, "messages": wire.messages(conversation), **sampling}
    return Call(CHAT, body, wire.completions)


def stream_body(
    conversation: wire.Conversation, model: str | None, sampling: Mapping[str, Any]
) -> bytes:
    """The body of a conversation whose answer is streamed, with its usage at the end."""
    body = {"model": model, "messages": wire.messages(conversation), **sampling}
    return wire.encode({**body, "stream": True, "stream_options": {"include_usage": True}})


def text_calls(
    path: str,
    text: str | Sequence[str],
    options: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], list[Any]],
) -> list[Call]:
    """Texts for an encoder, in parts."""
    texts = [text] if isinstance(text, str) else list(text)
    parts = [texts[at : at + TEXTS_PER_REQUEST] for at in range(0, len(texts), TEXTS_PER_REQUEST)]
    return [Call(path, {"input": part, **options}, parse) for part in parts]
