"""Base of all tasks: paths, request and reply bodies, inputs of the model, and the reply.

A task is made once per loaded model and keeps no state of requests. It runs on the event loop and
must be quick, except ``reply``, which runs in a thread for large results.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, TypeVar

from msgspec import UNSET, Struct
from msgspec.json import Decoder
from msgspec.structs import replace

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.model.types import ModelInput, Side
from cluster.engines.classifier.model.windows import max_stride
from cluster.engines.classifier.serving.jobs import Encoded, EncodeOptions
from cluster.engines.classifier.serving.schema import LongTextRequest, TaskRequest, WindowedRequest
from cluster.errors import InvalidRequestError

EntryT = TypeVar("EntryT", bound=Struct)
RequestT = TypeVar("RequestT", bound=TaskRequest)
T = TypeVar("T")


class Task(ABC, Generic[RequestT]):
    """One task of a classifier."""

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
    def inputs(self, request: RequestT) -> Sequence[ModelInput]:
        """Return the inputs of the model; raise ``RequestError`` if the request is impossible."""

    @abstractmethod
    def reply(self, request: RequestT, encoded: Encoded) -> Struct:
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
