"""Tasks of classifiers; each module has a task's paths, bodies, inputs and reply."""

from typing import Any

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.classifier.model.load import LoadedModel
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.engines.classifier.serving.tasks.classify import Classify
from cluster.engines.classifier.serving.tasks.embed import Embed
from cluster.engines.classifier.serving.tasks.fill_mask import FillMask
from cluster.engines.classifier.serving.tasks.next_sentence import NextSentence
from cluster.engines.classifier.serving.tasks.rerank import Rerank
from cluster.engines.classifier.serving.tasks.score import ScorePairs
from cluster.engines.classifier.serving.tasks.token_classification import TokenClassification

_ALL: tuple[type[Task[Any]], ...] = (
    Classify,
    Embed,
    FillMask,
    NextSentence,
    Rerank,
    ScorePairs,
    TokenClassification,
)
TASKS: dict[ClassifierTask, type[Task[Any]]] = {task.name: task for task in _ALL}


def make_tasks(config: ClassifierConfig, model: LoadedModel) -> dict[str, Task[Any]]:
    tasks = [TASKS[name](config, model) for name in config.tasks]
    return {path: task for task in tasks for path in task.paths}


def routes(config: ClassifierConfig) -> tuple[str, ...]:
    return tuple(path for name in config.tasks for path in TASKS[name].paths)
