"""Parsing of request bodies, and the parts that several endpoints share.

Errors: 400 if the body is not JSON or the request is impossible, 422 with the field's name if JSON
has the wrong shape.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Generic, TypeVar

from msgspec import UNSET, DecodeError, Meta, Struct, UnsetType, ValidationError
from msgspec.json import Decoder

from cluster.engines.classifier.model.types import Merge, Side, Text
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.errors import InvalidRequestError, UnprocessableError

AtLeastZero = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
T = TypeVar("T")


class TaskRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Fields of every task's request."""

    model: str | None = None
    truncate: bool | Side | UnsetType = UNSET
    """Side on which long texts are cut (true: right); false refuses them."""


class LongTextRequest(TaskRequest, frozen=True, kw_only=True):
    """Request of a task that can read long texts in windows."""

    stride: AtLeastZero | None = None
    """Overlap of neighbouring windows in tokens; null reads no windows."""
    aggregate: Merge = "mean"
    """Merging of a text's windows into one result."""


class WindowedRequest(LongTextRequest, frozen=True, kw_only=True):
    """Request of a task that can also return the result of each window."""

    windows: bool = False
    """True to return the result of each window."""


class ReplyUsage(Struct, frozen=True, gc=False):
    """OpenAI-style ``usage`` of a reply; special tokens are included."""

    prompt_tokens: int
    total_tokens: int


def usage(encoded: Encoded) -> ReplyUsage:
    return ReplyUsage(encoded.num_tokens, encoded.num_tokens)


class ListReply(Struct, Generic[T], frozen=True, kw_only=True):
    """Reply of most tasks, with one entry per input, in order."""

    object: str = "list"
    data: list[T]
    model: str
    usage: ReplyUsage


class Pair(Struct, frozen=True, forbid_unknown_fields=True):
    """A text, with or without its pair."""

    text: str
    text_pair: str | None = None


PairList = Annotated[list[str], Meta(min_length=2, max_length=2)]
"""A text and its pair as a list."""
Item = str | Pair | PairList
ItemOrList = str | Pair | list[Item]


def parse(decoder: Decoder[T], body: bytes) -> T:
    """Parse a body.

    Raises:
        InvalidRequestError: It is not JSON, or not UTF-8 (lone surrogates included).
        UnprocessableError: A field is unknown, missing or of the wrong type.
    """
    try:
        return decoder.decode(body)
    except ValidationError as error:
        raise _unprocessable_error(str(error)) from None
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not valid UTF-8") from None
    except (DecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None


def _unprocessable_error(message: str) -> UnprocessableError:
    """Translate msgspec's message, e.g. "Expected `str`, got `int` - at `$.input[1]`"."""
    problem, _, location = message.partition(" - at ")
    path = location.strip("`").removeprefix("$").lstrip(".")
    named = re.search(r"field `([^`]+)`", problem)
    param = path or (named[1] if named else None)
    text = f"{path}: {problem[0].lower()}{problem[1:]}" if path else problem
    return UnprocessableError(text, param=param)


def to_texts(value: ItemOrList) -> list[Text]:
    """Return the texts of an ``input`` with or without pairs."""
    items = value if isinstance(value, list) else [value]
    return [item if isinstance(item, str) else _to_text(item) for item in items]


def _to_text(item: Pair | Sequence[str]) -> Text:
    if isinstance(item, Pair):
        return item.text if item.text_pair is None else (item.text, item.text_pair)
    first, second = item
    return first, second


def single_texts(value: str | list[str], max_texts: int) -> list[str]:
    """Return the texts of an ``input`` without pairs; see ``check_count``."""
    texts = [value] if isinstance(value, str) else value
    check_count(len(texts), max_texts)
    return texts


def check_count(count: int, max_texts: int, param: str = "input") -> None:
    """Raise ``InvalidRequestError`` if a list is empty or too long."""
    if not count:
        raise InvalidRequestError(f"{param} is empty; at least one text is needed", param=param)
    if count > max_texts:
        message = f"{param} has {count} texts; a request may have {max_texts}"
        raise InvalidRequestError(message, param=param)
