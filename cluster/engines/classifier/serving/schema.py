"""Parsing of request bodies, and the parts that several endpoints share.

Errors: 400 if the body is not JSON or the request is impossible, 422 with the field's name if JSON
has the wrong shape.
"""

import re
from collections.abc import Sequence
from typing import Annotated, TypeVar

import numpy as np
from msgspec import DecodeError, Meta, Struct, ValidationError
from msgspec.json import Decoder

from cluster.engines.classifier.model.types import Text, TokenIds
from cluster.errors import InvalidRequestError, UnprocessableError

AtLeastOne = Annotated[int, Meta(ge=1)]
T = TypeVar("T")


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
    if isinstance(value, str):
        return [value]
    if isinstance(value, Pair):
        return [_to_text(value)]
    return [item if isinstance(item, str) else _to_text(item) for item in value]


def _to_text(item: Pair | Sequence[str]) -> Text:
    if isinstance(item, Pair):
        return item.text if item.text_pair is None else (item.text, item.text_pair)
    first, second = item
    return first, second


def single_texts(value: str | list[str], max_texts: int) -> list[str]:
    """Return the texts of an ``input`` without pairs.

    Raises:
        InvalidRequestError: There are none or too many.
    """
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


def split_input(items: str | Sequence[str | int | list[int]]) -> list[str] | list[list[int]]:
    """Return the four shapes of OpenAI's ``input`` as a list of texts or of lists of token ids.

    Raises:
        UnprocessableError: The list mixes them.
    """
    if isinstance(items, str):
        return [items]
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) == len(items):
        return texts
    ids = [item for item in items if isinstance(item, int)]
    if len(ids) == len(items):
        return [ids]
    lists = [item for item in items if isinstance(item, list)]
    if len(lists) == len(items):
        return lists
    raise UnprocessableError(
        "input: expected texts, token ids, or lists of token ids, got a mixture", param="input"
    )


def check_ids(index: int, ids: list[int], vocab_size: int) -> TokenIds:
    """Return the token ids of one text as an array.

    Raises:
        InvalidRequestError: There are none, or one is not in the vocabulary.
    """
    if not ids:
        raise InvalidRequestError(
            f"input[{index}] is empty; at least one token id is needed", param="input"
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise InvalidRequestError(
            f"input[{index}] has the token id {wrong}; allowed: 0 to {vocab_size - 1}",
            param="input",
        )
    return np.array(ids, np.int64)
