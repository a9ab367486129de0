"""What a task is: its paths, its bodies, which texts it wants computed, and what it answers.

A task is made once for a loaded model and keeps nothing of requests; all of it runs on the event
loop, so it must be quick.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from msgspec import Struct
from msgspec.json import Decoder

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.encoder.jobs import Encoded, TokenIds
from cluster.engines.encoder.model import LoadedModel


class Request(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the bodies of all tasks have in common."""

    model: str | None = None
    truncate: bool = False
    """Cut texts that are too long, where otherwise they are refused."""


class Usage(Struct, frozen=True, gc=False):
    """The tokens that were computed; special ones are included."""

    prompt_tokens: int
    total_tokens: int


T = TypeVar("T")
B = TypeVar("B", bound=Request)


class Listing(Struct, Generic[T], frozen=True, kw_only=True):
    """The reply of most tasks: one entry for each input, in order."""

    object: str = "list"
    data: list[T]
    model: str
    usage: Usage


class Task(ABC, Generic[B]):
    """One thing that an encoder does.

    Args:
        config: The pool.
        model: The loaded model, which can do the task.
    """

    name: ClassVar[ClassifierTask]
    head: ClassVar[ClassifierTask]
    """What the model is asked to compute for each input."""
    paths: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    """One line for the OpenAPI document."""
    request: type[B]
    response: type[Struct]

    def __init__(self, config: ClassifierConfig, model: LoadedModel) -> None:
        self.config = config
        self.model = model
        self.decoder = Decoder(self.request)

    @abstractmethod
    def inputs(self, request: B) -> Sequence[str] | Sequence[TokenIds]:
        """What the model has to compute.

        Raises:
            RequestError: the request is impossible.
        """

    @abstractmethod
    def reply(self, request: B, encoded: Encoded) -> Struct:
        """The answer, once everything is computed."""


def usage(encoded: Encoded) -> Usage:
    """The ``usage`` of a reply."""
    return Usage(encoded.num_tokens, encoded.num_tokens)
