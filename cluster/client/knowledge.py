"""Knowledge bases of the client: documents to search and to answer from."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from cluster.client import wire
from cluster.client.session import Session
from cluster.client.wire import ApiRequest, Upload
from cluster.config.applications import KNOWLEDGE_PATH
from cluster.errors import InvalidRequestError
from cluster.tasks.knowledge import (
    AddResult,
    Deleted,
    DocumentList,
    Knowledge,
    KnowledgeAnswer,
    KnowledgeDocument,
    KnowledgeList,
    SearchResult,
)

M = TypeVar("M", bound=BaseModel)


class KnowledgeBase:
    """One knowledge base, which may not exist yet; every method has an async form, as ``aadd``.

    ``options`` are further fields of the request.
    """

    def __init__(self, session: Session, name: str) -> None:
        self.name = name
        self._session = session
        self._path = f"{KNOWLEDGE_PATH}/{name}"

    def create(self, **options: Any) -> Knowledge:
        """Create it; options: ``model``, ``chunk_tokens``, ``language``."""
        return self._session.wait_for(self.acreate(**options))

    async def acreate(self, **options: Any) -> Knowledge:
        return await self._ask(Knowledge, KNOWLEDGE_PATH, {"name": self.name, **options})

    def describe(self) -> Knowledge:
        """Return its settings and its number of passages."""
        return self._session.wait_for(self.adescribe())

    async def adescribe(self) -> Knowledge:
        return await self._ask(Knowledge, self._path)

    def delete(self) -> None:
        """Delete it with all documents."""
        self._session.wait_for(self.adelete())

    async def adelete(self) -> None:
        await self._ask(Deleted, self._path, method="DELETE")

    def add(self, file: str | Path, *, id: str | None = None, type: str | None = None) -> AddResult:
        """Add a file, or replace what changed in it since it was added; see ``add_bytes``."""
        return self._session.wait_for(self.aadd(file, id=id, type=type))

    async def aadd(
        self, file: str | Path, *, id: str | None = None, type: str | None = None
    ) -> AddResult:
        path = Path(file)
        content = await asyncio.to_thread(path.read_bytes)
        return await self.aadd_bytes(content, id=id or path.name, type=type)

    def add_bytes(self, content: bytes, *, id: str, type: str | None = None) -> AddResult:
        """Add a document.

        Args:
            content: Content of a file.
            id: Id of the document; its ending tells the type.
            type: Type, if the id does not tell it: `text`, `markdown`, `html`, `pdf` or `docx`.
        """
        return self._session.wait_for(self.aadd_bytes(content, id=id, type=type))

    async def aadd_bytes(self, content: bytes, *, id: str, type: str | None = None) -> AddResult:
        fields = {"id": id, **({} if type is None else {"type": type})}
        form = Upload(content, id.rpartition("/")[2], fields)
        return await self._ask(AddResult, f"{self._path}/documents", form=form)

    def documents(self) -> list[KnowledgeDocument]:
        """List the documents by id."""
        return self._session.wait_for(self.adocuments())

    async def adocuments(self) -> list[KnowledgeDocument]:
        found: list[KnowledgeDocument] = []
        has_more = True
        while has_more:
            query = f"?after={quote(found[-1].id)}" if found else ""
            page = await self._ask(DocumentList, f"{self._path}/documents{query}")
            found += page.data
            has_more = page.has_more
        return found

    def remove(self, document: str) -> None:
        """Delete a document."""
        self._session.wait_for(self.aremove(document))

    async def aremove(self, document: str) -> None:
        if "?" in document:
            raise InvalidRequestError("The id of a document has no `?`.", param="id")
        await self._ask(Deleted, f"{self._path}/documents/{document}", method="DELETE")

    def search(self, query: str, **options: Any) -> SearchResult:
        """Find passages; options: ``limit``, ``mode``, ``rerank``."""
        return self._session.wait_for(self.asearch(query, **options))

    async def asearch(self, query: str, **options: Any) -> SearchResult:
        return await self._ask(SearchResult, f"{self._path}/search", {"query": query, **options})

    def answer(self, question: str, **options: Any) -> KnowledgeAnswer:
        """Answer a question; options: ``threshold``, ``max_passages``, ``model`` and others."""
        return self._session.wait_for(self.aanswer(question, **options))

    async def aanswer(self, question: str, **options: Any) -> KnowledgeAnswer:
        body = {"question": question, **options}
        return await self._ask(KnowledgeAnswer, f"{self._path}/answer", body)

    def stream_answer(self, question: str, **options: Any) -> Iterator[str | KnowledgeAnswer]:
        """Yield the pieces of an answer as they are generated, and the whole answer at the end."""
        batches = self._answer_batches(question, options)
        yield from self._session.iterate(batches)

    async def astream_answer(
        self, question: str, **options: Any
    ) -> AsyncIterator[str | KnowledgeAnswer]:
        async with aclosing(self._answer_batches(question, options)) as batches:
            async for items in batches:
                for item in items:
                    yield item

    def _answer_batches(self, question: str, options: Mapping[str, Any]) -> Any:
        body = wire.encode({"question": question, **options, "stream": True})
        reader = wire.result_reader(KnowledgeAnswer)
        return self._session.batches(f"{self._path}/answer", body, reader)

    async def _ask(
        self,
        model: type[M],
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        method: str | None = None,
        form: Upload | None = None,
    ) -> M:
        request = ApiRequest(
            path, body, lambda answer: [model.model_validate(answer)], form=form, method=method
        )
        found: M = (await self._session.run([request]))[0]
        return found


async def list_bases(session: Session) -> list[Knowledge]:
    """Return all knowledge bases of the tenant, by name."""

    def parse(answer: Any) -> list[Knowledge]:
        return KnowledgeList.model_validate(answer).data

    return await session.run([ApiRequest(KNOWLEDGE_PATH, None, parse)])
