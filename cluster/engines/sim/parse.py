"""Validation of request bodies, with vLLM's error responses.

Shapes and messages are those of vLLM 0.32 (``exception_handling/handlers/validation.py``).
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cluster.engines.json_body import decode_json
from cluster.errors import InvalidRequestError

_MAX_REPORTED = 10
_MAX_INPUT_CHARS = 200
_UNION_BRANCHES = {"str", "int", "list", "constrained-int"}


class ApiError(Exception):
    """Error response to a request, in OpenAI's shape."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, type_: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.type = type_ or "BadRequestError"

    def body(self) -> dict[str, Any]:
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.status,
        }
        return {"error": error}


def value_error(message: str, param: str, value: Any = None) -> ApiError:
    """Return an error in the form of vLLM's ``VLLMValidationError``, which names the parameter."""
    shown = "" if value is None else f", value={value}"
    return ApiError(f"{message} (parameter={param}{shown})", param)


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = None


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class Message(_Body):
    """One message of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(str(part.get("text", "")) for part in self.content)
        return self.content or ""


class _Sampling(_Body):
    n: int | None = 1
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    ignore_eos: bool = False
    return_token_ids: bool | None = None
    max_tokens: int | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(_Sampling):
    """``/v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True


def _not_empty(prompt: Any) -> Any:
    if prompt is None or prompt == "":
        raise _EmptyPrompt
    return prompt


class _EmptyPrompt(Exception):  # noqa: N818
    pass


_TokenId = Annotated[int, Field(ge=0, le=2**63 - 1)]


class CompletionBody(_Sampling):
    """``/v1/completions``."""

    prompt: Annotated[
        list[_TokenId] | list[list[_TokenId]] | str | list[str] | None,
        BeforeValidator(_not_empty),
        Field(validate_default=True),
    ] = None
    max_tokens: int | None = 16
    echo: bool | None = False


class TokenizeBody(_Body):
    """``/tokenize``, for a text or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False


class DetokenizeBody(_Body):
    """``/detokenize``."""

    tokens: list[_TokenId]


class ResponsesBody(_Body):
    """``/v1/responses``."""

    input: str | list[Message]
    request_id: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None


class MessagesBody(_Body):
    """``/v1/messages``."""

    model: str
    messages: list[Message]
    max_tokens: int
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = False


class CountTokensBody(_Body):
    """``/v1/messages/count_tokens``."""

    model: str
    messages: list[Message]
    system: str | list[dict[str, Any]] | None = None


def missing_field(body: BaseModel, *names: str) -> ApiError:
    """Return the error for a body that lacks all of the fields of which it needs one."""
    summary = f"<dict of {len(body.model_fields_set)} items>"
    found = [
        {"type": "missing", "loc": f"body.{name}", "msg": "Field required", "input": summary}
        for name in names
    ]
    return _bad_request(found, found[0]["loc"])


B = TypeVar("B", bound=BaseModel)


def parse_body(kind: type[B], raw: bytes, content_type: str) -> B:
    """Parse and validate a body.

    Raises:
        ApiError: The body is invalid.
    """
    if content_type.lower().split(";", maxsplit=1)[0] != "application/json":
        only = "Unsupported Media Type: Only 'application/json' is allowed"
        raise _bad_request([only], None)
    try:
        return kind.model_validate(_load(raw))
    except _EmptyPrompt:
        message = "Either prompt or prompt_embeds must be provided and non-empty."
        raise value_error(message, "prompt") from None
    except ValidationError as error:
        found = [_as_in_vllm(dict(item)) for item in error.errors(include_url=False)]
        raise _bad_request(found, found[0]["loc"]) from None


def _load(raw: bytes) -> Any:
    if not raw:
        missing = {"type": "missing", "loc": "body", "msg": "Field required", "input": "None"}
        raise _bad_request([missing], "body")
    try:
        return decode_json(raw)
    except InvalidRequestError as error:
        raise ApiError(error.message) from None


def _bad_request(errors: list[Any], param: str | None) -> ApiError:
    label = "error" if len(errors) == 1 else "errors"
    lines = "".join(f"  {error}\n" for error in errors[:_MAX_REPORTED])
    if (more := len(errors) - _MAX_REPORTED) > 0:
        lines += f"  ...and {more} more {label}\n"
    message = f"{len(errors)} validation {label}:\n{lines}".rstrip()
    return ApiError(message, param, type_="Bad Request")


def _as_in_vllm(error: dict[str, Any]) -> dict[str, Any]:
    parts = [str(part) for part in error["loc"]]
    kept = [part for part in parts if part not in _UNION_BRANCHES and "[" not in part]
    error["loc"] = ".".join(["body", *kept])
    error["input"] = _summary(error["input"])
    if error["type"] == "model_type":  # vLLM's FastAPI validates from attributes
        error["type"] = "model_attributes_type"
        error["msg"] = "Input should be a valid dictionary or object to extract fields from"
        error.pop("ctx", None)
    return error


def _summary(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = str(value)
    return text if len(text) <= _MAX_INPUT_CHARS else f"{text[:_MAX_INPUT_CHARS]}...[truncated]"
