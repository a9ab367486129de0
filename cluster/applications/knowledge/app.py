"""HTTP application of the knowledge bases."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError

from cluster.applications.http import Reply, parse_body
from cluster.applications.knowledge.forms import read_form
from cluster.applications.knowledge.ingest import (
    Ingest,
    check_document_id,
    create_base,
    describe,
)
from cluster.applications.knowledge.operations import MAX_LISTED, OPERATIONS
from cluster.applications.knowledge.reranking import Reranking
from cluster.applications.knowledge.search import answer, search
from cluster.applications.knowledge.store import Store
from cluster.applications.knowledge.table import Table
from cluster.applications.tasks import Run
from cluster.asgi import Receive, Scope, read_body
from cluster.config.applications import KNOWLEDGE_PATH
from cluster.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    OverloadedError,
)
from cluster.gateway.pools.delegation import read_caller
from cluster.tasks.knowledge import (
    BaseName,
    CreateKnowledgeRequest,
    Deleted,
    DocumentList,
    KnowledgeAnswerRequest,
    KnowledgeDocument,
    KnowledgeList,
    SearchRequest,
)

WAITING_PER_UPLOAD = 4
"""Uploads that may wait for each one that runs; further ones get status 429."""
_NAME: TypeAdapter[str] = TypeAdapter(BaseName)


@dataclass(frozen=True, slots=True)
class Target:
    """Operation of a request, and the names in its path."""

    operation: str
    name: str = ""
    document: str = ""


def find_target(method: str, path: str) -> Target:
    """Return the operation for a method and a path.

    Raises:
        NotFoundError: There is no such path.
        MethodNotAllowedError: It does not support the method.
        InvalidRequestError: The name of the base is invalid.
    """
    name, _, rest = path.removeprefix(KNOWLEDGE_PATH).removeprefix("/").partition("/")
    kind, _, document = rest.partition("/")
    template = "/".join(
        [KNOWLEDGE_PATH]
        + ["{name}"] * bool(name)
        + [kind] * bool(kind)
        + ["{document}"] * bool(document)
    )
    operations = {each.method: each for each in OPERATIONS if each.path == template}
    if not operations or path.endswith("/"):
        raise NotFoundError(f"No such path: {path}. GET /openapi.json lists all paths.")
    if method not in operations:
        raise MethodNotAllowedError.for_path(path, method, list(operations))
    if name:
        _check_name(name)
    return Target(operations[method].name, name, document)


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the knowledge bases."""

    scope: Scope
    receive: Receive
    reply: Reply
    run: Run
    target: Target

    @property
    def tenant(self) -> str:
        """Tenant of the sender, from the router."""
        headers = [(bytes(name), bytes(value)) for name, value in self.scope["headers"]]
        return read_caller(headers).tenant.name

    async def body(self, model: type[Any]) -> Any:
        """Return the request's body; raise ``ConnectionResetError`` if the client has left."""
        content = await read_body(self.receive)
        if content is None:
            raise ConnectionResetError("the client disconnected during its request")
        return parse_body(model, content, self.run.config.max_chars)


Handler = Callable[[Call], Awaitable[None]]


class KnowledgeApp:
    """Answers requests to ``/v1/knowledge``.

    Args:
        store: The knowledge bases.
        ingest: Adds documents.
        reranking: Orders what is found.
    """

    def __init__(self, store: Store, ingest: Ingest, reranking: Reranking) -> None:
        self._store = store
        self._ingest = ingest
        self._reranking = reranking
        self._num_uploads = 0
        self._uploads = asyncio.Semaphore(store.config.max_uploads)
        self._handlers: Mapping[str, Handler] = {
            "list": self._list,
            "create": self._create,
            "get": self._get,
            "delete": self._delete,
            "documents": self._documents,
            "add": self._add,
            "remove": self._remove,
            "search": self._search,
            "answer": self._answer,
        }

    async def answer(self, call: Call) -> None:
        """Answer a request.

        Raises:
            RequestError: It is refused.
        """
        await self._handlers[call.target.operation](call)

    async def _list(self, call: Call) -> None:
        names = await self._store.names(call.tenant)
        bases = [describe(name, await self._store.open(call.tenant, name)) for name in names]
        await call.reply.send_model(KnowledgeList(data=bases))

    async def _create(self, call: Call) -> None:
        request = await call.body(CreateKnowledgeRequest)
        table = await create_base(self._store, call.tenant, request, call.run)
        await call.reply.send_model(describe(request.name, table, await table.count()))

    async def _get(self, call: Call) -> None:
        table = await self._open(call)
        await call.reply.send_model(describe(call.target.name, table, await table.count()))

    async def _delete(self, call: Call) -> None:
        await self._store.drop(call.tenant, call.target.name)
        await call.reply.send_model(Deleted(id=call.target.name))

    async def _documents(self, call: Call) -> None:
        query = dict(parse_qsl(call.scope["query_string"].decode("latin-1")))
        limit = _read_limit(query.get("limit", str(MAX_LISTED)))
        found = await (await self._open(call)).documents(query.get("after", ""), limit + 1)
        documents = [KnowledgeDocument.model_validate(each) for each in found[:limit]]
        await call.reply.send_model(DocumentList(data=documents, has_more=len(found) > limit))

    async def _add(self, call: Call) -> None:
        config = call.run.config.knowledge
        if self._num_uploads >= config.max_uploads * (1 + WAITING_PER_UPLOAD):
            raise OverloadedError(
                f"{self._num_uploads} documents are being added or wait. Retry later.",
                retry_after_s=5,
            )
        self._num_uploads += 1
        try:
            # Before the body is read, so that few files are in memory.
            async with self._uploads:
                await self._add_now(call)
        finally:
            self._num_uploads -= 1

    async def _add_now(self, call: Call) -> None:
        table = await self._open(call)
        config = call.run.config.knowledge
        form = await read_form(call.scope, call.receive, int(config.max_file_bytes))
        if form is None:
            return
        file = form.file()
        document_id = check_document_id(form.fields.get("id") or file.name)
        result = await self._ingest.add(table, document_id, file, call.run)
        await call.reply.send_model(result)

    async def _remove(self, call: Call) -> None:
        table = await self._open(call)
        document = call.target.document
        if not await table.delete_document(document):
            raise NotFoundError(
                f"The knowledge base `{call.target.name}` has no document `{document}`.", param="id"
            )
        await call.reply.send_model(Deleted(id=document))

    async def _search(self, call: Call) -> None:
        request = await call.body(SearchRequest)
        result = await search(await self._open(call), request, call.run, self._reranking)
        await call.reply.send_model(result)

    async def _answer(self, call: Call) -> None:
        request = await call.body(KnowledgeAnswerRequest)
        table = await self._open(call)
        async with aclosing(answer(table, request, call.run, self._reranking)) as items:
            if request.stream:
                await call.reply.stream(items)
            else:
                await call.reply.send_result(items)

    async def _open(self, call: Call) -> Table:
        return await self._store.open(call.tenant, call.target.name)


def _check_name(name: str) -> None:
    try:
        _NAME.validate_python(name)
    except ValidationError:
        raise InvalidRequestError(
            "The name of a knowledge base has lower-case letters, digits, `_` and `-`, starts with "
            "a letter or digit, and has at most 63 characters.",
            param="name",
        ) from None


def _read_limit(value: str) -> int:
    is_number = value.isascii() and value.isdigit() and len(value) <= len(str(MAX_LISTED))
    if not is_number or not 1 <= int(value) <= MAX_LISTED:
        raise InvalidRequestError(f"limit must be from 1 to {MAX_LISTED}", param="limit")
    return int(value)
