"""Tasks of classifiers; each module has a task's paths, bodies, inputs and reply."""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.engines.classifier.serving.tasks.classify import Classify
from cluster.engines.classifier.serving.tasks.embed import Embed, Similarity, TokenVectors
from cluster.engines.classifier.serving.tasks.embed_sparse import EmbedSparse
from cluster.engines.classifier.serving.tasks.fill_mask import FillMask
from cluster.engines.classifier.serving.tasks.next_sentence import NextSentence
from cluster.engines.classifier.serving.tasks.pooling import PlainResults
from cluster.engines.classifier.serving.tasks.rerank import Rerank
from cluster.engines.classifier.serving.tasks.score import ScorePairs
from cluster.engines.classifier.serving.tasks.token_classification import TokenClassification

TASKS: Mapping[ClassifierTask, tuple[type[Task[Any]], ...]] = {
    "classify": (Classify, PlainResults),
    "embed": (Embed, Similarity, TokenVectors, PlainResults),
    "embed-sparse": (EmbedSparse,),
    "fill-mask": (FillMask,),
    "next-sentence": (NextSentence, PlainResults),
    "rerank": (Rerank, PlainResults),
    "score": (ScorePairs, PlainResults),
    "token-classification": (TokenClassification, PlainResults),
}
"""Tasks that each task of the configuration provides."""


def tasks_of(config: ClassifierConfig) -> Iterator[type[Task[Any]]]:
    """Return each task of the configuration once, in its order."""
    return iter(dict.fromkeys(task for name in config.tasks for task in TASKS[name]))
