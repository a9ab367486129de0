"""Requests and results of the typed tasks, ``POST /v1/tasks/…``.

``cluster.applications`` carries the tasks out; ``cluster.client`` sends and reads them.
"""

from cluster.tasks.requests import (
    AnswerRequest,
    ClassifyRequest,
    Document,
    Example,
    ExtractRequest,
    SentimentRequest,
    SummarizeRequest,
    TaskRequest,
    TranslateRequest,
)
from cluster.tasks.results import (
    AnswerResult,
    ClassifyResult,
    ExtractResult,
    Reference,
    SentimentResult,
    SummarizeResult,
    TaskResult,
    TaskUsage,
    TranslateResult,
)

__all__ = [
    "AnswerRequest",
    "AnswerResult",
    "ClassifyRequest",
    "ClassifyResult",
    "Document",
    "Example",
    "ExtractRequest",
    "ExtractResult",
    "Reference",
    "SentimentRequest",
    "SentimentResult",
    "SummarizeRequest",
    "SummarizeResult",
    "TaskRequest",
    "TaskResult",
    "TaskUsage",
    "TranslateRequest",
    "TranslateResult",
]
