"""The encoder's tasks: each module says its paths, its bodies, its inputs and its reply."""

from typing import Any

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.encoder.model import LoadedModel
from cluster.engines.encoder.tasks.base import Task
from cluster.engines.encoder.tasks.classify import Classify
from cluster.engines.encoder.tasks.embed import Embed

TASKS: dict[ClassifierTask, type[Task[Any]]] = {task.name: task for task in (Classify, Embed)}


def make_tasks(config: ClassifierConfig, model: LoadedModel) -> dict[str, Task[Any]]:
    """The configured tasks by their paths."""
    tasks = [TASKS[name](config, model) for name in config.tasks]
    return {path: task for task in tasks for path in task.paths}


def routes(config: ClassifierConfig) -> tuple[str, ...]:
    """The paths of the configured tasks."""
    return tuple(path for name in config.tasks for path in TASKS[name].paths)
