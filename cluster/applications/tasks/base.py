"""Interface of tasks, and what a task can use."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.applications.calls import Calls
from cluster.applications.prompts import Message, Prompt
from cluster.config import ApplicationsConfig
from cluster.errors import InvalidRequestError
from cluster.tasks import TaskRequest, TaskResult
from cluster.tasks.requests import GenerativeRequest

RESERVED_TOKENS = 16
"""Tokens of the context that are left free, for differences between a count and a prompt."""


@dataclass(frozen=True, slots=True)
class Run:
    """One request to a task."""

    id: str
    config: ApplicationsConfig
    prompts: Mapping[str, Prompt]
    calls: Calls

    def generator(self, model: str | None, param: str = "model") -> str:
        """Return the generator to use.

        Args:
            model: Name in the request.
            param: Field of the request with the name.

        Raises:
            InvalidRequestError: None is named, and none configured.
        """
        return self._choose(model or self.config.generator, "generator", param)

    def classifier(self, model: str | None) -> str:
        """Return the classifier to use; raises as ``generator`` does."""
        return self._choose(model or self.config.classifier, "classifier")

    def encoder(self, model: str | None) -> str:
        """Return the classifier for embeddings; raises as ``generator`` does."""
        return self._choose(model or self.config.encoder, "classifier with the task `embed`")

    def _choose(self, model: str | None, kind: str, param: str = "model") -> str:
        if model is None:
            raise InvalidRequestError(f"No {kind} is configured; name one.", param=param)
        return model

    def result_fields(self, task: str, model: str) -> dict[str, Any]:
        """Return the fields that every result has."""
        return {"id": self.id, "task": task, "model": model, "usage": self.calls.usage.report()}

    async def count(self, model: str, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""

        async def count_one(text: str) -> int:
            found = await self.calls.count_tokens(model, prompt=text, add_special_tokens=False)
            return found.tokens

        return await self.calls.map(count_one, texts)

    async def free_tokens(self, model: str, messages: list[Message]) -> int:
        """Return the tokens of the context that a conversation leaves free."""
        count = await self.calls.count_tokens(model, messages=messages)
        return count.context_tokens - count.tokens - RESERVED_TOKENS


@dataclass(frozen=True, slots=True)
class Task:
    """One task: its schemas and its function."""

    name: str
    request: type[TaskRequest]
    result: type[TaskResult]
    run: Callable[[Any, Run], AsyncGenerator[Any, None]]
    """Yields pieces of text, if the task generates any, and the result at the end."""

    @property
    def streams(self) -> bool:
        return issubclass(self.request, GenerativeRequest)


def turns(request: GenerativeRequest) -> list[tuple[Mapping[str, str], str]]:
    """Return the examples of a request as earlier turns of the conversation."""
    return [({"text": example.input}, example.output) for example in request.examples]
