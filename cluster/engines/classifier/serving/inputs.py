"""Inputs of requests that take texts, pairs, token ids or conversations, as the model's inputs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import UNSET, Struct, UnsetType, to_builtins

from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.template import cut_ids
from cluster.engines.classifier.model.types import ModelInput, Side, TokenIds
from cluster.engines.classifier.serving import schema
from cluster.errors import InvalidRequestError


class ContentPart(Struct, frozen=True):
    """Part of a message's content; only text is supported."""

    type: str = "text"
    text: str | None = None


Content = str | list[ContentPart] | None


class Message(Struct, frozen=True):
    """A turn of a conversation; fields beyond these do not reach the model's template."""

    role: str
    content: Content = None
    name: str | None = None


class InputObject(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A text with or without its pair, or a turn of a conversation."""

    text: str | None = None
    text_pair: str | None = None
    role: str | None = None
    content: Content = None
    name: str | None = None


InputItem = str | int | InputObject | list[str | int | InputObject]
"""A text, a token id, an object; a pair, token ids or a conversation as a list."""
Input = str | InputObject | list[InputItem]


class InputRequest(schema.WindowedRequest, frozen=True, kw_only=True):
    """Request with an ``input`` or ``messages``."""

    input: Input | UnsetType = UNSET
    messages: list[Message | list[Message]] | UnsetType = UNSET
    """A conversation, or several. The model's chat template makes a text of each; without one, the
    contents are joined by line breaks."""
    add_special_tokens: bool | None = None
    """False leaves out the model's special tokens. Default: true, unless a chat template adds
    them."""
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    """Must be null: templates of clients are not run."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""
    media_io_kwargs: dict[str, Any] | None = None
    """No effect: there are no images."""


def read_inputs(request: InputRequest, model: LoadedModel, max_texts: int) -> list[ModelInput]:
    """Return the model's inputs.

    Raises:
        InvalidRequestError: There are none or too many, kinds of input are mixed, token ids are
            not the model's, or a conversation has no text.
    """
    value = request.input
    if isinstance(value, str):  # the usual case
        return [value]
    reader = _InputReader(request, model)
    if request.messages is not UNSET:
        return reader.read_chats(request.messages, max_texts)
    if value is UNSET:
        raise InvalidRequestError("`input` or `messages` is required", param="input")
    items: list[Any] = value if isinstance(value, list) else [value]
    if items and all(type(item) is int for item in items):
        items = [items]
    elif items and all(isinstance(item, InputObject) and item.role for item in items):
        return [reader.read_chat(items)]
    schema.check_count(len(items), max_texts)
    return [item if isinstance(item, str) else reader.read(i, item) for i, item in enumerate(items)]


def adds_special_tokens(request: InputRequest, model: LoadedModel) -> bool:
    if request.add_special_tokens is not None:
        return request.add_special_tokens
    return request.messages is UNSET or not model.tokenizer.has_chat_template


class _InputReader:
    def __init__(self, request: InputRequest, model: LoadedModel) -> None:
        self._request = request
        self._model = model

    def read(self, index: int, item: Any) -> ModelInput:
        if isinstance(item, InputObject) and item.text is not None:
            return item.text if item.text_pair is None else (item.text, item.text_pair)
        if isinstance(item, list):
            if all(type(token) is int for token in item):
                return self._token_ids(index, item)
            if len(item) == 2 and all(isinstance(part, str) for part in item):
                return item[0], item[1]
            if item and all(isinstance(turn, InputObject) and turn.role for turn in item):
                return self.read_chat(item)
        raise InvalidRequestError(
            f"input[{index}]: expected a text, a pair of texts, or token ids; they cannot be mixed "
            "in one list",
            param="input",
        )

    def read_chats(
        self, messages: Sequence[Message | list[Message]], max_texts: int
    ) -> list[ModelInput]:
        if messages and isinstance(messages[0], Message):
            return [self.read_chat(messages)]
        schema.check_count(len(messages), max_texts, "messages")
        return [self.read_chat(chat if isinstance(chat, list) else []) for chat in messages]

    def read_chat(self, turns: Sequence[Any]) -> str:
        request = self._request
        variables = request.chat_template_kwargs or {}
        if request.chat_template is not None or "chat_template" in variables:
            message = "chat_template is not accepted; the model's own template is used"
            raise InvalidRequestError(message, param="chat_template")
        if not turns or not all(isinstance(turn, (Message, InputObject)) for turn in turns):
            message = "messages: expected one conversation, or a list of them"
            raise InvalidRequestError(message, param="messages")
        texts = [_text_of(turn.content) for turn in turns]
        tokenizer = self._model.tokenizer
        if not tokenizer.has_chat_template:
            return "\n".join(texts)
        chat = [
            {**to_builtins(turn), "content": text} for turn, text in zip(turns, texts, strict=True)
        ]
        try:
            return tokenizer.render_chat(
                chat,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **variables,
            )
        except Exception as error:  # templates raise their own errors
            message = f"messages do not fit the model's chat template: {str(error)[:500]}"
            raise InvalidRequestError(message, param="messages") from None

    def _token_ids(self, index: int, ids: list[Any]) -> TokenIds:
        request = self._request
        if request.stride is not None:
            raise InvalidRequestError("token ids cannot be read in windows", param="stride")
        if not ids:
            message = f"input[{index}] is empty; at least one token id is needed"
            raise InvalidRequestError(message, param="input")
        last = self._model.vocab_size - 1
        for token in (min(ids), max(ids)):
            if not 0 <= token <= last:
                message = f"input[{index}] has the token id {token}; allowed: 0 to {last}"
                raise InvalidRequestError(message, param="input")
        side, limit = self._cut(request)
        if len(ids) > limit:
            if side is None:
                raise self._model.tokenizer.too_long_error(index, len(ids))
            ids = cut_ids(ids, limit, side)
        return np.array(ids, np.int64)

    def _cut(self, request: InputRequest) -> tuple[Side | None, int]:
        limit = request.truncate_prompt_tokens
        side = truncation_side(request, by_default=False)
        if limit == 0:
            message = "truncate_prompt_tokens is 0; at least one token is needed"
            raise InvalidRequestError(message, param="truncate_prompt_tokens")
        return side, self._model.tokenizer.max_tokens if limit in (None, -1) else limit


def truncation_side(request: schema.TaskRequest, *, by_default: bool) -> Side | None:
    """Return the side on which long texts are cut; None if they are refused."""
    truncate = by_default if request.truncate is UNSET else request.truncate
    if truncate in ("left", "right"):
        return truncate
    if truncate or request.truncate_prompt_tokens is not None:
        return request.truncation_side or "right"
    return None


def _text_of(content: Content) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.text is None:
            message = f"a message has a part of type {part.type[:50]!r}; only text is supported"
            raise InvalidRequestError(message, param="messages")
    return "".join(part.text or "" for part in content)
