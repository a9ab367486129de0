"""Base of endpoints that answer without the model."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from msgspec import Struct

from cluster.config import ClassifierConfig
from cluster.engines.classifier.model.load import LoadedModel

BodyT = TypeVar("BodyT", bound=Struct)


class Tool(ABC, Generic[BodyT]):
    """One such endpoint; ``answer`` runs in a thread."""

    method: ClassVar[str] = "POST"
    paths: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    """One line for the OpenAPI document."""
    marking_field: ClassVar[str | None] = None
    """Field that only its bodies have, on a path that several formats share; None: all others."""
    request: type[BodyT]
    response: Any

    def __init__(self, config: ClassifierConfig, model: LoadedModel) -> None:
        self.config = config
        self.model = model

    @abstractmethod
    def answer(self, body: BodyT) -> Any:
        """Return the reply; raise ``RequestError`` if the request is impossible."""
