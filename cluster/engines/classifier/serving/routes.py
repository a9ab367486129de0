"""Endpoints of a classifier by its configuration: tasks, their translations, and tools."""

from collections.abc import Iterator
from typing import Any

from cluster.config import ClassifierConfig
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.serving.apis import TRANSLATIONS
from cluster.engines.classifier.serving.endpoints import Endpoint, PathEndpoints, Translation
from cluster.engines.classifier.serving.tasks import tasks_of
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.engines.classifier.serving.tools import TOOLS
from cluster.engines.classifier.serving.tools.base import Tool

Declared = tuple[str, type[Task[Any]] | type[Tool[Any]], Translation | None]
"""A path, what answers it, and the format if it is not the handler's own."""


def routes(config: ClassifierConfig) -> tuple[str, ...]:
    """Return all paths, which do not depend on the model."""
    return tuple(dict.fromkeys(path for path, _, _ in _declare(config)))


def make_routes(config: ClassifierConfig, model: LoadedModel) -> dict[str, PathEndpoints]:
    """Return the endpoints of all paths."""
    handlers = {kind: kind(config, model) for _, kind, _ in _declare(config)}
    by_path: dict[str, list[Endpoint]] = {}
    for path, kind, translation in _declare(config):
        by_path.setdefault(path, []).append(Endpoint(handlers[kind], translation))
    return {path: PathEndpoints(endpoints) for path, endpoints in by_path.items()}


def _declare(config: ClassifierConfig) -> Iterator[Declared]:
    for task in tasks_of(config):
        for path in task.paths:
            yield path, task, None
        for translation in TRANSLATIONS:
            if translation.task is task:
                for path in translation.paths:
                    yield path, task, translation
    for tool in TOOLS:
        for path in tool.paths:
            yield path, tool, None
