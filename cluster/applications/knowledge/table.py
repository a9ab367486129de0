"""One table of passages in LanceDB: its schema, changes, searches and indexes."""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import Any, Protocol, cast

import numpy as np

from cluster.applications.knowledge.encoder import Vectors
from cluster.tasks.knowledge import Language, Mode

KEEP_VERSIONS = timedelta(hours=1)
"""Age from which earlier versions of a table are removed; slower readers would fail."""
TEXT_INDEX = "content_idx"
_SETTINGS = b"tandem"
_PASSAGE_COLUMNS = ["document", "content", "text_at", "heading", "page", "start", "end", "vector"]


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """Settings of a knowledge base, fixed when it is created."""

    model: str
    dimensions: int
    chunk_tokens: int
    language: Language


@dataclass(frozen=True, slots=True)
class Row:
    """Passage to store."""

    id: str
    number: int
    content: str
    """Headings and text: what is embedded and searched."""
    text_at: int
    """Position of the text in the content."""
    heading: list[str]
    page: int | None
    start: int
    end: int

    def version(self, info: str) -> str:
        """Return a digest of what may change although the content does not."""
        parts = (self.number, self.page, self.start, self.end, info)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class Operations(Protocol):
    """Interface of the store for its tables."""

    def operation(self) -> AbstractAsyncContextManager[None]:
        """Bound and translate one operation; see ``Store``."""

    def note_change(self, table: "Table", num_rows: int) -> None:
        """Note that rows were added, changed or removed."""


class Table:
    """One knowledge base.

    Args:
        operations: The store.
        key: Name among all tables.
        inner: LanceDB's table.
        settings: Settings from its schema.
    """

    def __init__(
        self, operations: Operations, key: str, inner: Any, settings: BaseSettings
    ) -> None:
        self._operations = operations
        self._inner = inner
        self.key = key
        self.settings = settings

    async def count(self) -> int:
        async with self._operations.operation():
            return cast(int, await self._inner.count_rows())

    async def vectors(self, document: str) -> dict[str, Any]:
        """Return the vectors of a document's passages by the passages' ids."""
        async with self._operations.operation():
            query = self._inner.query().where(_is_document(document)).select(["id", "vector"])
            found = await query.to_arrow()
        size = self.settings.dimensions
        flat = found["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return dict(zip(found["id"].to_pylist(), flat.reshape(-1, size), strict=True))

    async def info(self, document: str) -> dict[str, Any] | None:
        """Return the properties of a document; None if the id is unknown."""
        async with self._operations.operation():
            where = _is_document(document) & _is_first()
            rows = await self._inner.query().where(where).select(["info"]).to_list()
        return json.loads(rows[0]["info"]) if rows else None

    async def documents(self, after: str, limit: int) -> list[dict[str, Any]]:
        """Return the properties of up to ``limit`` documents, by id, behind the id ``after``."""
        from lancedb.query import ColumnOrdering

        async with self._operations.operation():
            where = _is_first() & _is_after(after)
            query = self._inner.query().where(where).select(["info"])
            order = [ColumnOrdering(column_name="document", ascending=True, nulls_first=False)]
            rows = await query.order_by(order).limit(limit).to_list()
        return [json.loads(row["info"]) for row in rows]

    async def replace_document(
        self, document: str, info: Mapping[str, Any], rows: Sequence[Row], vectors: Vectors
    ) -> int:
        """Make ``rows`` the passages of a document, in one transaction; equal ones stay.

        Returns:
            Number of removed passages.
        """
        table = await asyncio.to_thread(self._to_arrow, document, info, rows, vectors)
        merge = (
            self._inner.merge_insert("id")
            .when_matched_update_all(where="target.version != source.version")
            .when_not_matched_insert_all()
            .when_not_matched_by_source_delete(_is_document(document))
        )
        async with self._operations.operation():
            result = await merge.execute(table)
        changed = result.num_inserted_rows + result.num_updated_rows + result.num_deleted_rows
        self._operations.note_change(self, changed)
        return cast(int, result.num_deleted_rows)

    async def delete_document(self, document: str) -> bool:
        """Remove a document; return False if the id is unknown."""
        async with self._operations.operation():
            result = await self._inner.delete(_is_document(document))
        self._operations.note_change(self, result.num_deleted_rows)
        return cast(int, result.num_deleted_rows) > 0

    async def search(
        self, query: str, vector: Vectors, mode: Mode, limit: int
    ) -> list[dict[str, Any]]:
        """Return the columns of up to ``limit`` passages, best first."""
        from lancedb.query import MatchQuery
        from lancedb.rerankers import RRFReranker

        search: Any = self._inner.query()
        if mode != "text":
            search = search.nearest_to(vector).distance_type("cosine")
        if mode != "vector":
            # In a string, LanceDB takes quotes for phrases, which the index does not support.
            words = MatchQuery(query, "content")  # type: ignore[call-arg]  # has an own __init__
            search = search.nearest_to_text(words)
        if mode == "hybrid":
            search = search.rerank(RRFReranker())
        scores = {"text": ["_score"], "vector": ["_distance"], "hybrid": []}[mode]
        async with self._operations.operation():
            found = search.select([*_PASSAGE_COLUMNS, *scores]).limit(limit)
            return cast(list[dict[str, Any]], await found.to_list())

    async def ensure_indexes(self) -> None:
        """Create what a new table lacks, or one whose creation was interrupted."""
        async with self._operations.operation():
            if all(index.name != TEXT_INDEX for index in await self._inner.list_indices()):
                # With a key, LanceDB notices that two processes insert the same row.
                await self._inner.set_unenforced_primary_key(["id"])
                await create_indexes(self._inner, self.settings)

    async def maintain(self, index_passages: int) -> None:
        """Add new rows to the indexes, and remove old versions."""
        from lancedb.index import IvfFlat

        await self._inner.optimize(cleanup_older_than=KEEP_VERSIONS)
        if await self._inner.count_rows() < index_passages:
            return
        if not any("vector" in index.columns for index in await self._inner.list_indices()):
            await self._inner.create_index("vector", config=IvfFlat(distance_type="cosine"))

    def _to_arrow(
        self, document: str, info: Mapping[str, Any], rows: Sequence[Row], vectors: Vectors
    ) -> Any:
        import pyarrow as pa

        schema = table_schema(self.settings)
        infos = [json.dumps(info, sort_keys=True) if row.number == 0 else "" for row in rows]
        columns: dict[str, Any] = {
            name: [getattr(row, name) for row in rows]
            for name in (field.name for field in fields(Row))
        }
        columns["document"] = [document] * len(rows)
        columns["info"] = infos
        columns["version"] = [row.version(own) for row, own in zip(rows, infos, strict=True)]
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, self.settings.dimensions)
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def table_schema(settings: BaseSettings) -> Any:
    """Return the Arrow schema of a knowledge base; its metadata has the settings."""
    import pyarrow as pa

    texts = ("id", "document", "content", "info", "version")
    numbers = ("number", "text_at", "page", "start", "end")
    columns = [pa.field(name, pa.string(), nullable=False) for name in texts]
    columns += [pa.field(name, pa.int32(), nullable=name == "page") for name in numbers]
    columns.append(pa.field("heading", pa.list_(pa.string())))
    columns.append(pa.field("vector", pa.list_(pa.float32(), settings.dimensions)))
    return pa.schema(columns, metadata={_SETTINGS: json.dumps(asdict(settings)).encode()})


def read_settings(schema: Any) -> BaseSettings:
    """Return the settings in the schema of a table."""
    return BaseSettings(**json.loads(schema.metadata[_SETTINGS]))


async def create_indexes(inner: Any, settings: BaseSettings) -> None:
    """Create the indexes of an empty table for words, and for the columns of conditions."""
    from lancedb.index import FTS, BTree

    has_language = settings.language != "none"
    words = FTS(
        language=settings.language if has_language else "English",
        stem=has_language,
        remove_stop_words=has_language,
        # ICU finds the words of Chinese or Thai; its stop words have digits and letters.
        base_tokenizer="simple" if has_language else "icu/split",
    )
    for column in ("id", "document"):
        await inner.create_index(column, config=BTree())
    await inner.create_index("content", config=words, name=TEXT_INDEX)


def _is_document(document: str) -> Any:
    # An expression, because the id is the client's: text in SQL would have to be quoted.
    from lancedb import col, lit

    return col("document") == lit(document)


def _is_first() -> Any:
    from lancedb import col, lit

    return col("number") == lit(0)


def _is_after(document: str) -> Any:
    from lancedb import col, lit

    return col("document") > lit(document)
