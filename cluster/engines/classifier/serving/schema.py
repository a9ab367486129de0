"""Fields that the requests and replies of several tasks share.

The names are those of vLLM's pooling API where it has the same concept.
"""

from collections.abc import Callable, Sequence
from secrets import token_hex
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from cluster.engines.classifier.model.types import Merge, Rows, Side, Text
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.errors import InvalidRequestError

AtLeastZero = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
T = TypeVar("T")

ActivationFunction = Literal["softmax", "sigmoid", "none"]
ACTIVATIONS: dict[str, Callable[[Rows], Rows]] = {
    "none": lambda logits: logits,
    "sigmoid": lambda logits: np.asarray(1 / (1 + np.exp(-logits)), np.float32),
    "softmax": lambda logits: _softmax(logits),
}


class TaskRequest(Struct, frozen=True, kw_only=True):
    """Fields of every task's request."""

    model: str | None = None
    truncate: bool | Side | UnsetType = UNSET
    """Side on which long texts are cut (true: right); false refuses them."""
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    """Length to which longer texts are cut, special tokens included; -1 is the model's length."""
    truncation_side: Side | None = None
    """Side on which long texts are cut, if they are; default: right."""
    request_id: Annotated[str, Meta(max_length=256)] | None = None
    """Suffix of the reply's ``id``."""
    padding: Literal["max_length", "do_not_pad"] | None = None
    """No effect: padding is never part of a result."""
    user: str | None = None
    """No effect; the tenant comes from the API key."""
    priority: int | None = None
    """No effect; the priority comes from the API key and from ``x-tandem-priority``."""
    cache_salt: str | None = None
    """No effect; see ``result_cache.isolate_tenants``."""
    mm_processor_kwargs: dict[str, Any] | None = None
    """No effect: there are no images."""

    def reply_id(self, prefix: str) -> str:
        return f"{prefix}-{self.request_id or token_hex(16)}"


class LongTextRequest(TaskRequest, frozen=True, kw_only=True):
    """Request of a task that can read long texts in windows."""

    stride: AtLeastZero | None = None
    """Overlap of neighbouring windows in tokens; null reads no windows."""
    aggregate: Merge = "mean"
    """Merging of a text's windows into one result."""


class WindowedRequest(LongTextRequest, frozen=True, kw_only=True):
    """Request of a task that can return the result of each window, and leave out activation."""

    windows: bool = False
    """True to return the result of each window."""
    use_activation: bool | None = None
    """False returns logits, or vectors that are not normalized."""
    activation: bool | ActivationFunction | None = None
    """Former name of ``use_activation``, or the function to apply to the logits."""
    softmax: bool | None = None
    """Former name of ``use_activation``."""

    @property
    def activation_choice(self) -> bool | ActivationFunction | None:
        """Choice of activation; None is the model's own."""
        for choice in (self.use_activation, self.activation, self.softmax):
            if choice is not None:
                return choice
        return None

    def activate(self, encoded: Encoded) -> tuple[Rows, Rows]:
        """Return the rows of all texts, and those of all windows, after the chosen activation."""
        choice = self.activation_choice
        if isinstance(choice, str):
            rows = ACTIVATIONS[choice](np.asarray(encoded.rows))
            return encoded.merge(rows, self.aggregate), rows
        return encoded.rows_by_text(self.aggregate), np.asarray(encoded.rows)


class ReplyUsage(Struct, frozen=True, gc=False):
    """OpenAI-style ``usage`` of a reply; special tokens are included."""

    prompt_tokens: int
    total_tokens: int


def usage(encoded: Encoded) -> ReplyUsage:
    return ReplyUsage(encoded.num_tokens, encoded.num_tokens)


class ListReply(Struct, Generic[T], frozen=True, kw_only=True):
    """Reply of most tasks, with one entry per input, in order."""

    id: str
    object: str = "list"
    created: int
    """Unix time in seconds."""
    data: list[T]
    model: str
    usage: ReplyUsage


class Pair(Struct, frozen=True, forbid_unknown_fields=True):
    """A text, with or without its pair."""

    text: str
    text_pair: str | None = None


PairList = Annotated[list[str], Meta(min_length=2, max_length=2)]
"""A text and its pair as a list."""
ItemOrList = str | Pair | list[str | Pair | PairList]


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


def _softmax(logits: Rows) -> Rows:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)
