"""Reading and checking the bodies of the encoder's endpoints; the tasks say what is in them.

JSON that cannot be read is a 400, JSON of the wrong shape a 422 that names the field, and a
request that is well-formed but impossible a 400.
"""

import re
from collections.abc import Sequence
from typing import Annotated, TypeVar

import numpy as np
from msgspec import DecodeError, Meta, ValidationError
from msgspec.json import Decoder

from cluster.engines.classifier.model.types import TokenIds
from cluster.errors import InvalidRequestError, RequestError, UnprocessableError

AtLeastOne = Annotated[int, Meta(ge=1)]
T = TypeVar("T")


def parse(decoder: Decoder[T], body: bytes) -> T:
    """Read a body.

    Raises:
        InvalidRequestError: it is not JSON, or not UTF-8 (lone surrogates included).
        UnprocessableError: a field is unknown, missing or of the wrong type.
    """
    try:
        return decoder.decode(body)
    except ValidationError as error:
        raise _unprocessable(str(error)) from None
    except UnicodeDecodeError:
        raise InvalidRequestError("the body is not valid UTF-8") from None
    except (DecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None


def _unprocessable(message: str) -> UnprocessableError:
    """msgspec's message as ours: "Expected `str`, got `int` - at `$.input[1]`"."""
    what, _, where = message.partition(" - at ")
    path = where.strip("`").removeprefix("$").lstrip(".")
    named = re.search(r"field `([^`]+)`", what)
    param = path or (named[1] if named else None)
    text = f"{path}: {what[0].lower()}{what[1:]}" if path else what
    return UnprocessableError(text, param=param)


def check_count(count: int, max_texts: int, param: str = "input") -> None:
    """Refuse an empty list and one that is too long."""
    if not count:
        raise InvalidRequestError(f"{param} is empty; at least one text is needed", param=param)
    if count > max_texts:
        message = f"{param} has {count} texts; a request may have {max_texts}"
        raise InvalidRequestError(message, param=param)


def texts_of(given: str | list[str], max_texts: int) -> list[str]:
    """The texts of an ``input`` without pairs.

    Raises:
        InvalidRequestError: there are none or too many.
    """
    texts = [given] if isinstance(given, str) else given
    check_count(len(texts), max_texts)
    return texts


def split_input(items: str | Sequence[str | int | list[int]]) -> list[str] | list[list[int]]:
    """The four shapes of OpenAI's ``input`` as a list of texts or of lists of token ids.

    Raises:
        UnprocessableError: the list mixes them.
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
    """The ids of one text as an array.

    Raises:
        RequestError: there are none, or one is not in the vocabulary.
    """
    if not ids:
        raise _bad_ids(f"input[{index}] is empty; at least one token id is needed")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise _bad_ids(f"input[{index}] holds the token id {wrong}; allowed: 0 to {vocab_size - 1}")
    return np.array(ids, np.int64)


def _bad_ids(message: str) -> RequestError:
    return InvalidRequestError(message, param="input")
