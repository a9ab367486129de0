"""Creation of knowledge bases, and documents that are added or replaced."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence
from weakref import WeakValueDictionary

import numpy as np

from cluster.applications.knowledge.document import Document
from cluster.applications.knowledge.encoder import Encoder, Vectors
from cluster.applications.knowledge.passages import Chunk, divide_document
from cluster.applications.knowledge.readers.files import File, read_file
from cluster.applications.knowledge.store import Store
from cluster.applications.knowledge.table import BaseSettings, Row, Table
from cluster.applications.tasks import Run
from cluster.errors import InvalidRequestError, PayloadTooLargeError, UnprocessableError
from cluster.tasks.knowledge import (
    MAX_ID_CHARS,
    AddResult,
    CreateKnowledgeRequest,
    Knowledge,
    KnowledgeDocument,
)

_READER_VERSION = 1
"""Version of readers and division; after a change, unchanged files are read again."""


async def create_base(
    store: Store, tenant: str, request: CreateKnowledgeRequest, run: Run
) -> Table:
    """Create a knowledge base; raises as ``Store.create`` does."""
    config = run.config.knowledge
    model = run.encoder(request.model or config.encoder)
    # The size of its vectors is fixed with the base.
    vectors = await Encoder(model, run.calls).embed([request.name])
    settings = BaseSettings(
        model=model,
        dimensions=vectors.shape[1],
        chunk_tokens=request.chunk_tokens or config.chunk_tokens,
        language=request.language,
    )
    return await store.create(tenant, request.name, settings)


def describe(name: str, table: Table, num_passages: int | None = None) -> Knowledge:
    """Return the description of a knowledge base."""
    settings = table.settings
    return Knowledge(
        name=name,
        model=settings.model,
        dimensions=settings.dimensions,
        chunk_tokens=settings.chunk_tokens,
        language=settings.language,
        passages=num_passages,
    )


class Ingest:
    """Documents that one replica adds, one after the other if they have the same id."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self.counts: Counter[str] = Counter()
        """Passages since the start: embedded, kept and removed."""

    async def add(self, table: Table, document_id: str, file: File, run: Run) -> AddResult:
        """Add a document, or replace the passages of an earlier version that differ.

        Raises:
            RequestError: The file cannot be read, or a limit is exceeded; see ``read_file``.
        """
        key = (table.key, document_id)
        if (lock := self._locks.get(key)) is None:
            lock = self._locks[key] = asyncio.Lock()
        async with lock:
            result = await self._add(table, document_id, file, run)
        for name in ("embedded", "kept", "removed"):
            self.counts[name] += getattr(result, name)
        return result

    async def _add(self, table: Table, document_id: str, file: File, run: Run) -> AddResult:
        digest = hashlib.sha256(file.content).hexdigest()
        known = await table.info(document_id)
        is_same = known is not None and known.pop("reader", None) == _READER_VERSION
        if known is not None and is_same and known["sha256"] == digest:
            info = KnowledgeDocument(**known)
            if file.type in (None, info.type):
                return _result(info, table, run, (0, info.passages, 0))
        document = await read_file(file, run.config.knowledge)
        encoder = Encoder(table.settings.model, run.calls)
        tokens = await encoder.tokens(document.text)
        chunks = await asyncio.to_thread(
            divide_document, document, tokens, table.settings.chunk_tokens
        )
        rows = await asyncio.to_thread(make_rows, document_id, document, chunks)
        old = await table.vectors(document_id)
        await self._check_size(table, len(rows) - len(old), run)
        vectors, num_embedded = await _vectors(table, encoder, rows, old)
        info = KnowledgeDocument(
            id=document_id,
            type=document.type,
            bytes=len(file.content),
            characters=len(document.text),
            pages=document.num_pages,
            passages=len(rows),
            sha256=digest,
        )
        stored = {**info.model_dump(), "reader": _READER_VERSION}
        removed = await table.replace_document(document_id, stored, rows, vectors)
        return _result(info, table, run, (num_embedded, len(rows) - num_embedded, removed))

    @staticmethod
    async def _check_size(table: Table, num_more: int, run: Run) -> None:
        limit = run.config.knowledge.max_passages
        num_passages = await table.count() + num_more
        if num_passages > limit:
            raise PayloadTooLargeError(
                f"The knowledge base would have {num_passages} passages; the limit is {limit} "
                "(applications.knowledge.max_passages). Delete documents, or use another one."
            )


def make_rows(document_id: str, document: Document, chunks: Sequence[Chunk]) -> list[Row]:
    """Return the rows of a document's passages; equal passages get different ids."""
    rows = []
    seen: Counter[str] = Counter()
    for number, chunk in enumerate(chunks):
        context = " > ".join(chunk.context)
        text = document.text[chunk.start : chunk.end]
        prefix = f"{context}\n" if context else ""
        content = prefix + text
        seen[content] += 1
        identity = "\0".join((document_id, content, str(seen[content])))
        rows.append(
            Row(
                id=hashlib.sha256(identity.encode()).hexdigest()[:32],
                number=number,
                content=content,
                text_at=len(prefix),
                heading=list(chunk.heading),
                page=chunk.page,
                start=chunk.start,
                end=chunk.end,
            )
        )
    return rows


async def _vectors(
    table: Table, encoder: Encoder, rows: Sequence[Row], old: dict[str, Vectors]
) -> tuple[Vectors, int]:
    """Return the vectors of all rows, and the number of those that were embedded now."""
    vectors = np.empty((len(rows), table.settings.dimensions), np.float32)
    missing = []
    for index, row in enumerate(rows):
        if row.id in old:
            vectors[index] = old[row.id]
        else:
            missing.append(index)
    if missing:
        new = await encoder.embed([rows[index].content for index in missing])
        check_dimensions(table, new)
        vectors[missing] = new
    return vectors, len(missing)


def check_dimensions(table: Table, vectors: Vectors) -> None:
    """Raise ``UnprocessableError`` if the model's vectors do not fit the base."""
    if vectors.shape[1] != table.settings.dimensions:
        raise UnprocessableError(
            f"The model `{table.settings.model}` now returns {vectors.shape[1]} dimensions; the "
            f"knowledge base has {table.settings.dimensions}. Create another one.",
            param="model",
        )


def _result(
    info: KnowledgeDocument, table: Table, run: Run, counts: tuple[int, int, int]
) -> AddResult:
    embedded, kept, removed = counts
    return AddResult(
        **run.result_fields("knowledge-add", table.settings.model),
        document=info,
        embedded=embedded,
        kept=kept,
        removed=removed,
    )


def check_document_id(document_id: str) -> str:
    """Return the id of a document; raise ``InvalidRequestError`` if it cannot be one."""
    is_path = document_id.strip("/") == document_id and "//" not in document_id
    is_path &= "?" not in document_id and "#" not in document_id
    if not is_path or not 0 < len(document_id) <= MAX_ID_CHARS or not document_id.isprintable():
        raise InvalidRequestError(
            f"The id of a document has 1 to {MAX_ID_CHARS} printable characters, without `?`, `#`, "
            "and `/` at its ends.",
            param="id",
        )
    return document_id
