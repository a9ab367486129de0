"""Typed tasks of the client: ``Tandem`` inherits these methods."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from cluster.client import wire
from cluster.client.session import Session
from cluster.config.applications import TASK_PREFIX
from cluster.tasks import (
    AnswerResult,
    ClassifyResult,
    ExtractResult,
    SentimentResult,
    SummarizeResult,
    TaskResult,
    TranslateResult,
)

R = TypeVar("R", bound=TaskResult)

RESULTS: Mapping[str, type[TaskResult]] = {
    "answer": AnswerResult,
    "classify": ClassifyResult,
    "extract": ExtractResult,
    "sentiment": SentimentResult,
    "summarize": SummarizeResult,
    "translate": TranslateResult,
}


class TaskMethods:
    """Methods for ``/v1/tasks/…``; ``options`` are further fields of the request."""

    _session: Session

    def translate(self, text: str, target: str, **options: Any) -> TranslateResult:
        """Translate a text to a language (BCP 47); options: ``source``, ``glossary`` and others."""
        return self._session.wait_for(self.atranslate(text, target, **options))

    async def atranslate(self, text: str, target: str, **options: Any) -> TranslateResult:
        return await self._task(TranslateResult, "translate", text=text, target=target, **options)

    def summarize(self, text: str, **options: Any) -> SummarizeResult:
        """Summarize a text; options: ``length``, ``style``, ``references`` and others."""
        return self._session.wait_for(self.asummarize(text, **options))

    async def asummarize(self, text: str, **options: Any) -> SummarizeResult:
        return await self._task(SummarizeResult, "summarize", text=text, **options)

    def answer(self, question: str, documents: Sequence[str], **options: Any) -> AnswerResult:
        """Answer a question from documents; options: ``threshold``, ``max_passages`` and others."""
        return self._session.wait_for(self.aanswer(question, documents, **options))

    async def aanswer(
        self, question: str, documents: Sequence[str], **options: Any
    ) -> AnswerResult:
        texts = [{"text": document} for document in documents]
        fields = {"question": question, "documents": texts, **options}
        return await self._task(AnswerResult, "answer", **fields)

    def sentiment(self, texts: Sequence[str], **options: Any) -> SentimentResult:
        """Find the sentiment of texts; options: ``aspects``, ``generator``."""
        return self._session.wait_for(self.asentiment(texts, **options))

    async def asentiment(self, texts: Sequence[str], **options: Any) -> SentimentResult:
        return await self._task(SentimentResult, "sentiment", texts=list(texts), **options)

    def extract(self, text: str, json_schema: Mapping[str, Any], **options: Any) -> ExtractResult:
        """Extract data by a JSON schema; options: ``instructions``, ``examples`` and others."""
        return self._session.wait_for(self.aextract(text, json_schema, **options))

    async def aextract(
        self, text: str, json_schema: Mapping[str, Any], **options: Any
    ) -> ExtractResult:
        fields = {"text": text, "json_schema": json_schema, **options}
        return await self._task(ExtractResult, "extract", **fields)

    def label(self, texts: Sequence[str], labels: Sequence[str], **options: Any) -> ClassifyResult:
        """Classify texts by labels without training; options: ``method``, ``examples``."""
        return self._session.wait_for(self.alabel(texts, labels, **options))

    async def alabel(
        self, texts: Sequence[str], labels: Sequence[str], **options: Any
    ) -> ClassifyResult:
        fields = {"texts": list(texts), "labels": list(labels), **options}
        return await self._task(ClassifyResult, "classify", **fields)

    def stream_task(self, task: str, **fields: Any) -> Iterator[str | TaskResult]:
        """Yield the pieces of text of a task as they are generated, and its result at the end."""
        batches = self._task_batches(task, fields)
        yield from self._session.iterate(batches)

    async def astream_task(self, task: str, **fields: Any) -> AsyncIterator[str | TaskResult]:
        async with aclosing(self._task_batches(task, fields)) as batches:
            async for items in batches:
                for item in items:
                    yield item

    async def _task(self, result: type[R], task: str, **fields: Any) -> R:
        def parse(answer: Mapping[str, Any]) -> list[R]:
            return [result.model_validate(answer)]

        request = wire.ApiRequest(TASK_PREFIX + task, fields, parse)
        found: R = (await self._session.run([request]))[0]
        return found

    def _task_batches(
        self, task: str, fields: Mapping[str, Any]
    ) -> AsyncGenerator[list[str | TaskResult], None]:
        body = wire.encode({**fields, "stream": True})
        reader: wire.EventReader[str | TaskResult] = wire.result_reader(RESULTS[task])
        return self._session.batches(TASK_PREFIX + task, body, reader)
