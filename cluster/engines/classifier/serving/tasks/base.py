"""What a task is: its paths, its bodies, which texts it wants computed, and what it answers.

A task is made once for a loaded model and keeps nothing of requests. All of it runs on the event
loop, so it must be quick; but ``reply`` runs in a thread when there is much to write.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Generic, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.json import Decoder

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.template import Side
from cluster.engines.classifier.model.types import Text, TokenIds
from cluster.engines.classifier.model.windows import Merge, Window, max_stride
from cluster.engines.classifier.serving.jobs import Encoded, EncodeOptions
from cluster.errors import InvalidRequestError

AtLeastZero = Annotated[int, Meta(ge=0)]


class Request(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the bodies of all tasks have in common."""

    model: str | None = None
    truncate: bool | Side | UnsetType = UNSET
    """Cut texts that are too long, at their end unless it says left; false refuses them."""


class LongRequest(Request, frozen=True, kw_only=True):
    """And of those that read long texts in windows."""

    stride: AtLeastZero | None = None
    """Read texts that are too long in windows, of which neighbours share so many tokens."""
    aggregate: Merge = "mean"
    """How the windows of a text make one result."""


class WindowedRequest(LongRequest, frozen=True, kw_only=True):
    """And of those that give the windows' own results."""

    windows: bool = False
    """Give the result of each window too."""


class ReplyUsage(Struct, frozen=True, gc=False):
    """OpenAI-style ``usage`` of a reply; special tokens are included."""

    prompt_tokens: int
    total_tokens: int


Inputs = Sequence[Text] | Sequence[TokenIds]
T = TypeVar("T")
B = TypeVar("B", bound=Request)


class Listing(Struct, Generic[T], frozen=True, kw_only=True):
    """The reply of most tasks: one entry for each input, in order."""

    object: str = "list"
    data: list[T]
    model: str
    usage: ReplyUsage


class Task(ABC, Generic[B]):
    """One thing that an encoder does.

    Args:
        config: The pool.
        model: The loaded model, which can do the task.
    """

    name: ClassVar[ClassifierTask]
    head: ClassVar[ClassifierTask]
    """What the model is asked to compute for each input."""
    with_offsets: ClassVar[bool] = False
    """Whether the reply says where in a text something is."""
    truncate: ClassVar[bool] = False
    """Whether texts that are too long are cut where the request does not say."""
    paths: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    """One line for the OpenAPI document."""
    request: type[B]
    response: type[Struct]

    def __init__(self, config: ClassifierConfig, model: LoadedModel) -> None:
        self.config = config
        self.model = model
        self.decoder = Decoder(self.request)

    def how(self, request: B) -> EncodeOptions:
        """What to compute of each input, and how texts are read.

        Raises:
            InvalidRequestError: the stride is too large, or it stands beside ``truncate``, or
                windows are asked for without one.
        """
        if isinstance(request, LongRequest) and request.stride is not None:
            return EncodeOptions(
                self.head, None, self._stride(request, request.stride), self.with_offsets
            )
        if isinstance(request, WindowedRequest) and request.windows:
            raise InvalidRequestError("windows: true needs a stride", param="windows")
        truncate = self.truncate if request.truncate is UNSET else request.truncate
        return EncodeOptions(
            self.head, "right" if truncate is True else truncate or None, None, self.with_offsets
        )

    def _stride(self, request: LongRequest, stride: int) -> int:
        if request.truncate:
            raise InvalidRequestError("truncate and stride exclude each other", param="stride")
        if stride > (limit := max_stride(self.model.tokenizer)):
            message = f"stride is {stride}; with this model it may be {limit}"
            raise InvalidRequestError(message, param="stride")
        return stride

    @abstractmethod
    def inputs(self, request: B) -> Inputs:
        """What the model has to compute.

        Raises:
            RequestError: the request is impossible.
        """

    @abstractmethod
    def reply(self, request: B, encoded: Encoded) -> Struct:
        """The answer, once everything is computed."""


def split_windows(encoded: Encoded, rows: Sequence[T]) -> list[list[tuple[Window, T]]]:
    """Each text's windows with what ``rows`` has for them."""
    left = iter(rows)
    return [[(window, next(left)) for window in windows] for windows in encoded.windows]


def column(encoded: Encoded, how: Merge) -> list[float]:
    """The first column of each text's row, the windows of a text merged."""
    first: list[float] = encoded.rows_by_text(how)[:, 0].tolist()
    return first


def usage(encoded: Encoded) -> ReplyUsage:
    """The ``usage`` of a reply."""
    return ReplyUsage(encoded.num_tokens, encoded.num_tokens)
