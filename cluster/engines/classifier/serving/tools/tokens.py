"""Tokens of texts and texts of tokens, in the formats of vLLM and of text-embeddings-inference."""

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.inputs import (
    InputRequest,
    Message,
    adds_special_tokens,
    read_inputs,
)
from cluster.engines.classifier.serving.tools.base import Tool
from cluster.errors import InvalidRequestError

MAX_CHARS = 500_000
"""Characters of all texts of a request; they are tokenized in half a second."""
MAX_TOKENS = MAX_CHARS // 4
"""Token ids of a request."""

TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class TokenizeBody(Struct, frozen=True, kw_only=True):
    """vLLM's body of ``POST /tokenize``: a text or a conversation."""

    model: str | None = None
    prompt: str | UnsetType = UNSET
    messages: list[Message] | UnsetType = UNSET
    add_special_tokens: bool | None = None
    """Default: true, unless the model's chat template adds them."""
    return_token_strs: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class TokenizeReply(Struct, frozen=True):
    """vLLM's reply: token ids, and the longest text that the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Tokenize(Tool[TokenizeBody]):
    """``/tokenize`` in vLLM's format."""

    paths = ("/tokenize",)
    summary = "Tokenize a text, which may be longer than the model takes."
    request = TokenizeBody
    response = TokenizeReply

    def answer(self, body: TokenizeBody) -> TokenizeReply:
        text, special_tokens = body.prompt, body.add_special_tokens is not False
        if body.messages is not UNSET:
            request = InputRequest(
                messages=[*body.messages],
                add_special_tokens=body.add_special_tokens,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template=body.chat_template,
                chat_template_kwargs=body.chat_template_kwargs,
            )
            special_tokens = adds_special_tokens(request, self.model)
            (text,) = (str(item) for item in read_inputs(request, self.model, 1))
        if text is UNSET:
            raise InvalidRequestError("`prompt` or `messages` is required", param="prompt")
        _check_length(len(text), MAX_CHARS, "characters", "prompt")
        encoding = _encode(self, text, special_tokens, "prompt")
        strings = encoding.tokens if body.return_token_strs else None
        limit = self.model.tokenizer.max_tokens
        return TokenizeReply(len(encoding.ids), limit, encoding.ids, strings)


class ListTokensBody(Struct, frozen=True, kw_only=True):
    """Body of ``POST /tokenize`` in the format of text-embeddings-inference."""

    model: str | None = None
    inputs: str | list[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None
    """Must be null: prompts are not stored with the model."""


class Token(Struct, frozen=True, gc=False):
    """A token with its characters; special tokens have none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class ListTokens(Tool[ListTokensBody]):
    """``/tokenize`` in the format of text-embeddings-inference."""

    paths = ("/tokenize",)
    summary = "List the tokens of one or more texts (text-embeddings-inference)."
    marking_field = "inputs"
    request = ListTokensBody
    response = list[list[Token]]

    def answer(self, body: ListTokensBody) -> list[list[Token]]:
        if body.prompt_name is not None:
            raise InvalidRequestError("prompt_name: the model has no prompts", param="prompt_name")
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        schema.check_count(len(texts), self.config.max_texts, "inputs")
        _check_length(sum(map(len, texts)), MAX_CHARS, "characters", "inputs")
        return [self._tokens(text, body.add_special_tokens) for text in texts]

    def _tokens(self, text: str, special_tokens: bool) -> list[Token]:
        encoding = _encode(self, text, special_tokens, "inputs")
        columns = encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets
        return [
            Token(id_, token, True, None, None)
            if special
            else Token(id_, text[start:stop], False, start, stop)
            for id_, token, special, (start, stop) in zip(*columns, strict=True)
        ]


class DetokenizeBody(Struct, frozen=True, kw_only=True):
    """vLLM's body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId]


class DetokenizeReply(Struct, frozen=True):
    """vLLM's reply."""

    prompt: str


class Detokenize(Tool[DetokenizeBody]):
    """``/detokenize`` in vLLM's format."""

    paths = ("/detokenize",)
    summary = "Return the text of token ids."
    request = DetokenizeBody
    response = DetokenizeReply

    def answer(self, body: DetokenizeBody) -> DetokenizeReply:
        _check_length(len(body.tokens), MAX_TOKENS, "token ids", "tokens")
        return DetokenizeReply(self.model.tokenizer.decode_ids(body.tokens))


class DecodeBody(Struct, frozen=True, kw_only=True):
    """Body of ``POST /decode`` in the format of text-embeddings-inference."""

    model: str | None = None
    ids: list[TokenId | list[TokenId]]
    skip_special_tokens: bool = True


class Decode(Tool[DecodeBody]):
    """``/decode`` in the format of text-embeddings-inference."""

    paths = ("/decode",)
    summary = "Return the texts of lists of token ids (text-embeddings-inference)."
    request = DecodeBody
    response = list[str]

    def answer(self, body: DecodeBody) -> list[str]:
        rows = [row for row in body.ids if isinstance(row, list)]
        single = [token for token in body.ids if isinstance(token, int)]
        if bool(rows) == bool(single):
            message = "ids: expected a list of token ids, or a list of such lists"
            raise InvalidRequestError(message, param="ids")
        schema.check_count(len(rows or [single]), self.config.max_texts, "ids")
        _check_length(len(single) + sum(map(len, rows)), MAX_TOKENS, "token ids", "ids")
        tokenizer, skip = self.model.tokenizer, body.skip_special_tokens
        return [tokenizer.decode_ids(row, skip_special_tokens=skip) for row in rows or [single]]


def _check_length(length: int, limit: int, unit: str, param: str) -> None:
    if length > limit:
        message = f"{param} has {length} {unit}; a request may have {limit}"
        raise InvalidRequestError(message, param=param)


def _encode(tool: Tool[Any], text: str, special_tokens: bool, param: str) -> Any:
    try:
        return tool.model.tokenizer.encode_plain(text, special_tokens)
    except (TypeError, UnicodeError):
        raise InvalidRequestError(f"{param} is not valid Unicode", param=param) from None
