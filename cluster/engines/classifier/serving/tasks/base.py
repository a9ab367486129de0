"""Base of all tasks: paths, request and reply bodies, inputs of the model, and the reply.

A task is made once per loaded model and keeps no state of requests. It runs on the event loop and
must be quick, except ``reply``, which runs in a thread for large results.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Generic, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.json import Decoder
from msgspec.structs import replace

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.template import Side
from cluster.engines.classifier.model.types import Text, TokenIds
from cluster.engines.classifier.model.windows import Merge, Window, max_stride
from cluster.engines.classifier.serving.jobs import Encoded, EncodeOptions
from cluster.errors import InvalidRequestError

AtLeastZero = Annotated[int, Meta(ge=0)]


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


ModelInputs = Sequence[Text] | Sequence[TokenIds]
T = TypeVar("T")
S = TypeVar("S", bound=Struct)
RequestT = TypeVar("RequestT", bound=TaskRequest)


class ListReply(Struct, Generic[T], frozen=True, kw_only=True):
    """Reply of most tasks, with one entry per input, in order."""

    object: str = "list"
    data: list[T]
    model: str
    usage: ReplyUsage


class Task(ABC, Generic[RequestT]):
    """One task of a classifier.

    Args:
        config: The pool.
        model: A loaded model that can do the task.
    """

    name: ClassVar[ClassifierTask]
    head: ClassVar[ClassifierTask]
    """Result that the model computes for each input."""
    with_offsets: ClassVar[bool] = False
    """True if the reply has character offsets."""
    truncate: ClassVar[bool] = False
    """Treatment of long texts if the request does not specify it."""
    paths: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    """One line for the OpenAPI document."""
    request: type[RequestT]
    response: type[Struct]

    def __init__(self, config: ClassifierConfig, model: LoadedModel) -> None:
        self.config = config
        self.model = model
        self.decoder = Decoder(self.request)

    def options(self, request: RequestT) -> EncodeOptions:
        """Return the result to compute per input, and how to treat long texts.

        Raises:
            InvalidRequestError: The stride is too large or combined with ``truncate``, or
                windows are requested without a stride.
        """
        if isinstance(request, LongTextRequest) and request.stride is not None:
            self._check_stride(request, request.stride)
            return EncodeOptions(self.head, None, request.stride, self.with_offsets)
        if isinstance(request, WindowedRequest) and request.windows:
            raise InvalidRequestError("windows: true needs a stride", param="windows")
        truncate = self.truncate if request.truncate is UNSET else request.truncate
        side: Side | None = "right" if truncate is True else truncate or None
        return EncodeOptions(self.head, side, None, self.with_offsets)

    def _check_stride(self, request: LongTextRequest, stride: int) -> None:
        if request.truncate:
            raise InvalidRequestError("truncate and stride exclude each other", param="stride")
        if stride > (limit := max_stride(self.model.tokenizer)):
            message = f"stride is {stride}; the limit of this model is {limit}"
            raise InvalidRequestError(message, param="stride")

    @abstractmethod
    def inputs(self, request: RequestT) -> ModelInputs:
        """Return the inputs of the model.

        Raises:
            RequestError: The request is impossible.
        """

    @abstractmethod
    def reply(self, request: RequestT, encoded: Encoded) -> Struct:
        """Return the reply for the model's results."""


def split_windows(encoded: Encoded, rows: Sequence[T]) -> list[list[tuple[Window, T]]]:
    """Return each text's windows with their entries of ``rows``."""
    left = iter(rows)
    return [[(window, next(left)) for window in windows] for windows in encoded.windows]


def with_windows(entries: Sequence[S], windows: Sequence[Sequence[Struct]]) -> list[S]:
    """Return the entries of a reply with their ``windows`` set."""
    return [replace(entry, windows=parts) for entry, parts in zip(entries, windows, strict=True)]


def first_column(encoded: Encoded, merge: Merge) -> list[float]:
    """Return the first column of each text's row."""
    column: list[float] = encoded.rows_by_text(merge)[:, 0].tolist()
    return column


def usage(encoded: Encoded) -> ReplyUsage:
    """Return the ``usage`` of a reply."""
    return ReplyUsage(encoded.num_tokens, encoded.num_tokens)
