"""Base of all tasks: paths, request and reply bodies, inputs of the model, and the reply.

A task is made once per loaded model and keeps no state of requests. It runs on the event loop and
must be quick, except ``reply``, which runs in a thread for large results.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.types import Head, ModelInput, Tokenization
from cluster.engines.classifier.model.windows import max_stride
from cluster.engines.classifier.serving.inputs import (
    InputRequest,
    adds_special_tokens,
    truncation_side,
)
from cluster.engines.classifier.serving.jobs import Encoded, EncodeOptions
from cluster.engines.classifier.serving.schema import LongTextRequest, TaskRequest, WindowedRequest
from cluster.errors import InvalidRequestError

EntryT = TypeVar("EntryT", bound=Struct)
RequestT = TypeVar("RequestT", bound=TaskRequest)
T = TypeVar("T")


class Task(ABC, Generic[RequestT]):
    """One task of a classifier."""

    name: ClassVar[ClassifierTask]
    head: ClassVar[Head]
    """Result that the model computes for each input."""
    with_offsets: ClassVar[bool] = False
    """True if the reply has character offsets."""
    truncate: ClassVar[bool] = False
    """Treatment of long texts if the request does not specify it."""
    paths: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    """One line for the OpenAPI document."""
    request: type[RequestT]
    response: Any
    """Type of the reply, for the OpenAPI document."""

    def __init__(self, config: ClassifierConfig, model: LoadedModel) -> None:
        self.config = config
        self.model = model

    def head_for(self, request: RequestT) -> Head:
        """Return the result that the model computes for each input."""
        return self.head

    def options(self, request: RequestT) -> EncodeOptions:
        """Return the result to compute per input, and how to treat long texts.

        Raises:
            InvalidRequestError: The stride is too large or combined with truncation, windows are
                requested without a stride, or the text may be longer than the model takes.
        """
        head, tokenization = self.head_for(request), self.tokenization(request)
        if isinstance(request, LongTextRequest) and request.stride is not None:
            self._check_stride(request, request.stride)
            return EncodeOptions(head, None, request.stride, self.with_offsets, tokenization)
        if isinstance(request, WindowedRequest) and request.windows:
            raise InvalidRequestError("windows: true needs a stride", param="windows")
        side = truncation_side(request, by_default=self.truncate)
        return EncodeOptions(head, side, None, self.with_offsets, tokenization)

    def tokenization(self, request: RequestT) -> Tokenization | None:
        """Return how the texts are tokenized; None as usual."""
        limit = request.truncate_prompt_tokens
        is_bare = isinstance(request, InputRequest) and not adds_special_tokens(request, self.model)
        if not is_bare and limit in (None, -1):
            return None
        if limit is not None and limit > (longest := self.model.tokenizer.max_tokens):
            message = f"truncate_prompt_tokens is {limit}; the model takes {longest} tokens"
            raise InvalidRequestError(message, param="truncate_prompt_tokens")
        return Tokenization(None if limit == -1 else limit, special_tokens=not is_bare)

    def _check_stride(self, request: LongTextRequest, stride: int) -> None:
        if request.truncate or request.truncate_prompt_tokens is not None:
            raise InvalidRequestError("truncate and stride exclude each other", param="stride")
        if stride > (limit := max_stride(self.model.tokenizer)):
            message = f"stride is {stride}; the limit of this model is {limit}"
            raise InvalidRequestError(message, param="stride")

    @abstractmethod
    def inputs(self, request: RequestT) -> Sequence[ModelInput]:
        """Return the inputs of the model; raise ``RequestError`` if the request is impossible."""

    @abstractmethod
    def reply(self, request: RequestT, encoded: Encoded) -> Any:
        """Return the reply for the model's results."""


def with_windows(
    data: Sequence[EntryT],
    encoded: Encoded,
    values: Sequence[T],
    make: Callable[[int, int, T], Struct],
) -> list[EntryT]:
    """Return the entries of a reply with their ``windows`` set.

    Args:
        data: One entry per text.
        encoded: Results with windows.
        values: One value per window of all texts.
        make: Makes a window of the reply from its start, its end and its value.
    """
    rest = iter(values)
    return [
        replace(entry, windows=[make(window.start, window.end, next(rest)) for window in windows])
        for entry, windows in zip(data, encoded.windows, strict=True)
    ]
