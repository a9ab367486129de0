"""Decoding of request bodies, and fingerprints of prompts: hashes of growing prefixes of a text.

The result is the same in every process, so router and replicas compute it independently instead of
exchanging it. No tokenizer is involved: a replica maps the prefixes to the tokens that its engine
made of them (``cluster.engines.prefix_cache``). Pure.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest as digest

MAX_BODY_BYTES = 1024 * 1024
"""Longer bodies get no fingerprint: few models have a context that long, and decoding and hashing
block the event loop. Files in base64 do not count."""
GENERATE_PATH = "/inference/v1/generate"
TOKEN_ID_BYTES = 4
MAX_ITEMS = 16385
"""Number of items up to which a list of prompts is counted, so that a huge one costs little; one
more than the highest ``router.max_sequences_per_request``."""

# (limit, step): up to ``limit`` bytes, a prefix ends every ``step`` bytes. The steps are finest at
# the start, the part that prompts share most often.
_PREFIX_STEPS = ((2048, 128), (16 * 1024, 512), (64 * 1024, 2048), (MAX_BODY_BYTES, 8192))


_MIN_ITEM_BYTES = 3  # of a list of texts: two quotes and a comma
_FILE_MARKS = (b";base64,", b'"data"')  # of data URLs; of `source` and `input_audio`
_MAX_FILES = 1024  # of one body that are searched for; more than `media.max_items` allows
_MAX_BLANKS = 4096  # longer white space before the first item is as good as none

PREFIX_ENDS = tuple(
    end
    for (start, _), (limit, step) in pairwise(((0, 0), *_PREFIX_STEPS))
    for end in range(start + step, limit + 1, step)
)
"""Ends of all prefixes, in bytes of the prompt's text."""
_PREFIX_PARTS = tuple(slice(start, end) for start, end in pairwise((0, *PREFIX_ENDS)))


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Facts about one request, read from its body."""

    hashes: tuple[int, ...] = ()
    """64-bit hashes of growing prefixes of the (first) prompt, the shortest first."""
    ends: tuple[int, ...] = ()
    """End of each prefix, in bytes."""
    total_bytes: int = 0
    """Length of the prompt's text; ``TOKEN_ID_BYTES`` for each token id."""
    is_tokens: bool = False
    """True if the prompt was given as token ids."""
    session: str | None = None
    """The body's ``user``."""
    max_tokens: int | None = None
    """Limit of the completion of one prompt, in tokens."""
    model: str = ""
    """Requested model or adapter."""


EMPTY_FINGERPRINT = Fingerprint()


class FanOut(NamedTuple):
    """Sequences that an engine runs for one request."""

    prompts: int = 1
    """Prompts, texts or conversations in the body."""
    sequences: int = 1
    """Completions of all prompts, or as many as prompts if nothing is generated."""


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


class RequestBody(msgspec.Struct):
    """Fields of a JSON body that a router reads; decoding skips the rest.

    All but ``model`` may have any type here, because the engine reports wrong values.
    """

    model: str | None = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None
    priority: Any = None
    stream: Any = None
    previous_response_id: Any = None
    truncate_prompt_tokens: Any = None
    truncation: Any = None

    @property
    def is_truncated(self) -> bool:
        """True if the engine shortens a prompt that is too long instead of rejecting it."""
        return self.truncate_prompt_tokens is not None or self.truncation == "auto"

    @property
    def prompt_limit(self) -> float | None:
        """Length to which the engine shortens each prompt, in tokens; None if not given."""
        limit = self.truncate_prompt_tokens
        return float(limit) if _is_count(limit) else None

    @property
    def completion_limit(self) -> float | None:
        """Limit of each completion, in tokens; None if the body sets none."""
        for limit in (self.max_completion_tokens, self.max_tokens, self.max_output_tokens):
            if _is_count(limit):
                return float(limit)
        return None

    @property
    def fan_out(self) -> FanOut:
        """Number of prompts and sequences of the request."""
        prompts = max(1, self._num_prompts())
        return FanOut(prompts, prompts * max(_to_count(self.n), _to_count(self.best_of)))

    def _num_prompts(self) -> int:
        return 1

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the prompt, or ``EMPTY_FINGERPRINT`` if it is unreadable."""
        try:
            return self._fingerprint()
        except (UnicodeError, OverflowError, TypeError):  # lone surrogates, bad token ids
            return EMPTY_FINGERPRINT

    def _fingerprint(self) -> Fingerprint:
        return EMPTY_FINGERPRINT


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 2**31


def _to_count(value: Any) -> int:
    """Return a number as pydantic reads it in the engine, which also accepts "3" and 3.0."""
    if value is None:
        return 1
    try:
        return max(1, int(value))
    except (TypeError, ValueError, OverflowError):
        return 1


class _ListBody(RequestBody):
    """Body with a list of prompts, texts or conversations, in the APIs of vLLM and classifiers."""

    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    inputs: msgspec.Raw = msgspec.Raw()
    texts: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    items: msgspec.Raw = msgspec.Raw()
    queries: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()
    data_1: msgspec.Raw = msgspec.Raw()
    data_2: msgspec.Raw = msgspec.Raw()
    text_1: msgspec.Raw = msgspec.Raw()
    text_2: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt_embeds: msgspec.Raw = msgspec.Raw()

    def _num_prompts(self) -> int:
        num_embeds = _count_embeds(self.prompt_embeds)
        if num_embeds and (not self.prompt or bytes(memoryview(self.prompt)[:4]) == b"null"):
            return num_embeds
        return num_embeds + self._num_listed()

    def _num_listed(self) -> int:
        lists = [
            *(self.prompt, self.input, self.inputs, self.texts, self.documents, self.items),
            *(self.queries, self.data, self.data_1, self.data_2, self.text_1, self.text_2),
        ]
        # A list of messages is one conversation; a list of lists is a batch of them.
        return max(_count_items(self.messages, b"["), *map(_count_items, lists))


def _count_items(raw: msgspec.Raw, starts: bytes = b'["{') -> int:
    """Return the length of a JSON list whose items start with one of some bytes; 1 for others."""
    if not raw or memoryview(raw)[0] != ord("["):
        return 1
    # Token ids are one prompt; there may be millions, so they are not decoded.
    start = bytes(memoryview(raw)[1:_MAX_BLANKS]).lstrip()[:1]
    if start and start not in starts:
        return 1
    if len(memoryview(raw)) < _MIN_ITEM_BYTES * MAX_ITEMS:
        items = _decode_items(raw)
    else:
        items = [item for item in msgspec.structs.astuple(_items_decoder()(raw)) if item]
    return len(items) if items and memoryview(items[0])[0] in starts else 1


def prepare_decoders() -> None:
    """Build at start what the first huge list would build on the event loop, which takes 60 ms."""
    _items_decoder()


@cache
def _items_decoder() -> Callable[[msgspec.Raw], msgspec.Struct]:
    """Return a decoder of the first ``MAX_ITEMS`` items of a list, which skips the rest."""
    fields = [(f"item_{index}", msgspec.Raw, msgspec.Raw()) for index in range(MAX_ITEMS)]
    return msgspec.json.Decoder(msgspec.defstruct("Items", fields, array_like=True)).decode


def _count_embeds(raw: msgspec.Raw) -> int:
    return _count_items(raw) if raw and bytes(memoryview(raw)[:4]) != b"null" else 0


class _SamplingParams(msgspec.Struct):
    n: Any = None
    max_tokens: Any = None


class _Generate(_ListBody):
    """Body of ``GENERATE_PATH``: token ids, and the fields of other bodies in a nested object."""

    token_ids: msgspec.Raw = msgspec.Raw()
    sampling_params: msgspec.Raw = msgspec.Raw()

    def __post_init__(self) -> None:
        try:
            params = _decode_sampling(self.sampling_params)
        except msgspec.DecodeError:  # left to the engine
            return
        self.n, self.max_tokens = params.n, params.max_tokens

    def _fingerprint(self) -> Fingerprint:
        ids = bytes(self.token_ids)
        num_tokens = ids.count(b",") + 1 if len(ids) > 2 else 0
        return Fingerprint(  # without hashes
            total_bytes=num_tokens * TOKEN_ID_BYTES, is_tokens=True, model=self.model or ""
        )


class _PromptBody(RequestBody):
    max_tokens: int | None = None
    cache_salt: str | None = None
    user: str | None = None
    tools: msgspec.Raw = msgspec.Raw()

    def _hash(self, text: bytes, max_tokens: int | None, is_tokens: bool = False) -> Fingerprint:
        model = self.model or ""
        seed = digest("\0".join((model, self.cache_salt or "", str(is_tokens))).encode())
        ends = PREFIX_ENDS[: bisect_right(PREFIX_ENDS, len(text))]
        hashes = tuple([seed := digest(text[part], seed) for part in _PREFIX_PARTS[: len(ends)]])
        return Fingerprint(hashes, ends, len(text), is_tokens, self.user, max_tokens, model)


class _Chat(_PromptBody):
    max_completion_tokens: int | None = None
    messages: list[_Message] = []
    system: str | list[_Part] | None = None

    def _fingerprint(self) -> Fingerprint:
        text = _conversation(self, self.system, self.messages)
        return self._hash(text.encode(), self.max_completion_tokens or self.max_tokens)


class _Completion(_PromptBody):
    prompt: str | list[str | int | list[int]] = ""
    prompt_embeds: msgspec.Raw = msgspec.Raw()

    def _num_prompts(self) -> int:
        num_embeds = _count_embeds(self.prompt_embeds)
        return num_embeds + (0 if num_embeds and not self.prompt else self._num_texts())

    def _num_texts(self) -> int:
        is_list = isinstance(self.prompt, list) and not isinstance(next(iter(self.prompt), 0), int)
        return len(self.prompt) if is_list else 1

    def _fingerprint(self) -> Fingerprint:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._hash(prompt.encode(), self.max_tokens)
        ids = array("I", prompt)  # raises if an item is not a token id
        return self._hash(ids.tobytes(), self.max_tokens, is_tokens=True)


class _Responses(_PromptBody):
    max_output_tokens: int | None = None
    input: str | list[_Message] = ""
    instructions: str | None = None
    previous_response_id: str | None = None

    def _fingerprint(self) -> Fingerprint:
        if self.previous_response_id is not None:  # the earlier turns are unknown here
            return Fingerprint(session=self.user, max_tokens=self.max_output_tokens)
        messages = [_Message("user", self.input)] if isinstance(self.input, str) else self.input
        text = _conversation(self, self.instructions, messages)
        return self._hash(text.encode(), self.max_output_tokens)


_decode_chat = msgspec.json.Decoder(_Chat).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_fields = msgspec.json.Decoder(_ListBody).decode
_decode_generate = msgspec.json.Decoder(_Generate).decode
_decode_sampling = msgspec.json.Decoder(_SamplingParams).decode
_DECODE_PROMPT: Mapping[str, Callable[[bytes], _PromptBody]] = {
    "/v1/chat/completions": _decode_chat,
    "/v1/messages": _decode_chat,
    "/v1/completions": msgspec.json.Decoder(_Completion).decode,
    "/v1/responses": msgspec.json.Decoder(_Responses).decode,
}
PROMPT_PATHS = tuple(_DECODE_PROMPT)
"""Paths whose bodies have a prompt that gets a fingerprint."""


def decode_body(path: str, body: bytes) -> RequestBody:
    """Decode a body once, with its prompt if ``path`` has one and the prompt is readable.

    Raises:
        msgspec.DecodeError: The body is not valid JSON, not an object, or has a wrong ``model``.
    """
    if path == GENERATE_PATH:
        return _decode_generate(body)
    return _decode_with_prompt(path, body) or _decode_fields(body)


def fingerprint(path: str, body: bytes) -> Fingerprint:
    """Return the fingerprint of a request, or ``EMPTY_FINGERPRINT`` if its prompt is unreadable.

    Never raises: reporting what is wrong with a body is left to the engine.
    """
    decoded = _decode_with_prompt(path, body)
    return EMPTY_FINGERPRINT if decoded is None else decoded.fingerprint()


def _decode_with_prompt(path: str, body: bytes) -> _PromptBody | None:
    decode = _DECODE_PROMPT.get(path)
    if decode is None or (len(body) > MAX_BODY_BYTES and _other_bytes(body) > MAX_BODY_BYTES):
        return None
    try:
        return decode(body)
    except (msgspec.DecodeError, UnicodeError, OverflowError, TypeError, RecursionError):
        return None


def _other_bytes(body: bytes) -> int:
    """Return the length of a JSON body without the files in it, which are long strings.

    Decoding skips them quickly, so text that looks like a file does no harm.
    """
    other = len(body)
    for mark in _FILE_MARKS:
        position = 0
        for _ in range(_MAX_FILES):
            if (position := body.find(mark, position)) < 0:
                break
            start = position + len(mark)
            is_key = mark.endswith(b'"')  # the value follows
            if is_key:
                start = body.find(b'"', start) + 1
            position = body.find(b'"', start)
            if not start or position < 0:
                break
            if not (is_key and body.find(_FILE_MARKS[0], start, position) >= 0):  # counted above
                other -= position - start
    return other


def _conversation(
    body: _PromptBody, system: str | list[_Part] | None, messages: list[_Message]
) -> str:
    """Return the text in the order of chat templates: system, tools, then turn by turn.

    Roles and line breaks are placed as in most templates, so that lengths nearly agree.
    """
    texts: list[str] = []
    if system is not None:
        _add_turn(texts, "system", system)
    elif messages and messages[0].role in ("system", "developer"):
        _add_turn(texts, messages[0].role, messages[0].content)
        messages = messages[1:]
    if body.tools:
        texts.append(_text(body.tools))
    for message in messages:
        _add_turn(texts, message.role, message.content)
        if message.tool_calls:
            texts.append(_text(message.tool_calls))
    return "".join(texts)


def _add_turn(texts: list[str], role: str, content: str | list[_Part] | None) -> None:
    parts = (content,) if isinstance(content, str) else map(_part_text, content or ())
    texts += (role, "\n", *parts, "\n")


def _part_text(part: _Part) -> str:
    """Return the text of a part; for an image, a hash, because its tokens are not text."""
    if part.text is not None:
        return part.text
    texts = [_text(raw) for raw in (part.content, part.input) if raw]
    texts += [f"<{digest(bytes(raw)):x}>" for raw in (part.image_url, part.source) if raw]
    return "".join(texts)


def _text(raw: msgspec.Raw) -> str:
    return bytes(raw).decode()
