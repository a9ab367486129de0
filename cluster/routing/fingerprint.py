"""What a router and a replica both know a prompt by: hashes of growing prefixes of its text.

Pure, and the same in every process, so that neither has to send it to the other. No tokenizer: a
replica ties the prefixes to the tokens that its engine made of them.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest as digest

MAX_BODY_BYTES = 1024 * 1024
"""Longer bodies are not read: few engines have a context for their text, and it would take long."""
_STEPS = ((2048, 128), (16 * 1024, 512), (64 * 1024, 2048), (MAX_BODY_BYTES, 8192))
"""Up to so many bytes a prefix ends after each of so many: beginnings are what prompts share."""
TOKEN_ID_BYTES = 4


def _all_ends() -> tuple[int, ...]:
    ends: list[int] = []
    start = 0
    for stop, step in _STEPS:
        ends += range(start + step, stop + 1, step)
        start = stop
    return tuple(ends)


ENDS = _all_ends()
"""Where prefixes end, in bytes of the prompt's text."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What was read of one request's body."""

    hashes: tuple[int, ...] = ()
    """64-bit hashes of growing prefixes of the (first) prompt, the shortest first."""
    ends: tuple[int, ...] = ()
    """Where each of them ends, in bytes."""
    total_bytes: int = 0
    """Of the prompt's text, all parts together; 4 for each token id."""
    is_tokens: bool = False
    """The prompt was given as token ids."""
    session: str | None = None
    """The body's ``user``."""
    max_tokens: int | None = None
    """The most that may be generated for one prompt."""
    model: str = ""
    """The model or adapter that is asked for."""


EMPTY = Fingerprint()


class _Part(msgspec.Struct):
    type: str = "text"
    text: str | None = None
    image_url: msgspec.Raw = msgspec.Raw()
    source: msgspec.Raw = msgspec.Raw()
    content: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


class _Message(msgspec.Struct):
    role: str = ""
    content: str | list[_Part] | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


class _Body(msgspec.Struct):
    model: str | None = None
    cache_salt: str | None = None
    user: str | None = None
    max_tokens: int | None = None
    tools: msgspec.Raw = msgspec.Raw()


class _Chat(_Body):
    messages: list[_Message] = []
    system: str | list[_Part] | None = None
    max_completion_tokens: int | None = None


class _Completion(_Body):
    prompt: str | list[str | int | list[int]] = ""


class _Responses(_Body):
    input: str | list[_Message] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None


_chat = msgspec.json.Decoder(_Chat).decode
_completion = msgspec.json.Decoder(_Completion).decode
_responses = msgspec.json.Decoder(_Responses).decode

PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/completions", "/v1/responses")
"""Of requests whose prompt is understood."""


def fingerprint(path: str, body: bytes) -> Fingerprint:
    """The fingerprint of one request; an empty one where its prompt is not understood.

    What is wrong with a body, the engine says.
    """
    if len(body) > MAX_BODY_BYTES or path not in PATHS:
        return EMPTY
    try:
        if path == "/v1/completions":
            return _of_completion(_completion(body))
        if path == "/v1/responses":
            return _of_responses(_responses(body))
        return _of_chat(_chat(body))
    except (msgspec.DecodeError, UnicodeError, OverflowError, TypeError, RecursionError):
        return EMPTY


def _of_chat(body: _Chat) -> Fingerprint:
    most = body.max_completion_tokens or body.max_tokens
    return _of_text(body, _conversation(body, body.system, body.messages), most)


def _of_responses(body: _Responses) -> Fingerprint:
    if body.previous_response_id is not None:  # what comes before this is not known here
        return Fingerprint(session=body.user, max_tokens=body.max_output_tokens)
    given = body.input
    messages = [_Message("user", given)] if isinstance(given, str) else given
    texts = _conversation(body, body.instructions, messages)
    return _of_text(body, texts, body.max_output_tokens)


def _of_completion(body: _Completion) -> Fingerprint:
    prompt: Any = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _of_text(body, (prompt,), body.max_tokens)
    ids = array("I", prompt)  # what is no token id raises
    return _of_bytes(body, ids.tobytes(), body.max_tokens, is_tokens=True)


def _conversation(
    body: _Body, system: str | list[_Part] | None, messages: list[_Message]
) -> Iterator[str]:
    """The texts in the order of chat templates: system, tools, then turn by turn.

    Roles and line breaks stand where most templates have them, so that lengths nearly agree.
    """
    start = 0
    if system is not None:
        yield from _turn("system", system)
    elif messages and messages[0].role in ("system", "developer"):
        start = 1
        yield from _turn(messages[0].role, messages[0].content)
    if body.tools:
        yield _text(body.tools)
    for message in messages[start:]:
        yield from _turn(message.role, message.content)
        if message.tool_calls:
            yield _text(message.tool_calls)


def _turn(role: str, content: str | list[_Part] | None) -> Iterator[str]:
    yield role
    yield "\n"
    if isinstance(content, str):
        yield content
    else:
        for part in content or ():
            yield from _part(part)
    yield "\n"


def _part(part: _Part) -> Iterator[str]:
    """The text of a part; of an image and the like a short mark, since its tokens are others."""
    if part.text is not None:
        yield part.text
        return
    for raw in (part.content, part.input):
        if raw:
            yield _text(raw)
    for raw in (part.image_url, part.source):
        if raw:
            yield f"<{digest(bytes(raw)):x}>"


def _text(raw: msgspec.Raw) -> str:
    return bytes(raw).decode()


def _of_text(body: _Body, texts: Sequence[str] | Iterator[str], most: int | None) -> Fingerprint:
    return _of_bytes(body, "".join(texts).encode(), most)


def _of_bytes(
    body: _Body, data: bytes, most: int | None, *, is_tokens: bool = False
) -> Fingerprint:
    model = body.model or ""
    seed = digest("\0".join((model, body.cache_salt or "", str(is_tokens))).encode())
    ends: list[int] = []
    hashes: list[int] = []
    view, size, start = memoryview(data), len(data), 0
    for end in ENDS:
        if end > size:
            break
        seed = digest(view[start:end], seed)
        hashes.append(seed)
        ends.append(end)
        start = end
    return Fingerprint(tuple(hashes), tuple(ends), size, is_tokens, body.user, most, model)
