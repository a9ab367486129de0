"""All tasks, by path."""

from collections.abc import Mapping

from cluster.applications.tasks.answer import answer
from cluster.applications.tasks.base import Task
from cluster.applications.tasks.classify import classify
from cluster.applications.tasks.extract import extract
from cluster.applications.tasks.sentiment import sentiment
from cluster.applications.tasks.summarize import summarize
from cluster.applications.tasks.translate import translate
from cluster.config.applications import TASK_PREFIX
from cluster.tasks import (
    AnswerRequest,
    AnswerResult,
    ClassifyRequest,
    ClassifyResult,
    ExtractRequest,
    ExtractResult,
    SentimentRequest,
    SentimentResult,
    SummarizeRequest,
    SummarizeResult,
    TranslateRequest,
    TranslateResult,
)

_TASKS = (
    Task("answer", AnswerRequest, AnswerResult, answer),
    Task("classify", ClassifyRequest, ClassifyResult, classify),
    Task("extract", ExtractRequest, ExtractResult, extract),
    Task("sentiment", SentimentRequest, SentimentResult, sentiment),
    Task("summarize", SummarizeRequest, SummarizeResult, summarize),
    Task("translate", TranslateRequest, TranslateResult, translate),
)
TASKS_BY_PATH: Mapping[str, Task] = {TASK_PREFIX + task.name: task for task in _TASKS}
