"""Handlers of ``/v1/files`` and ``/v1/batches``, in OpenAI's formats."""

import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import IO, Any, NamedTuple

import msgspec

from cluster.batches import ENDPOINTS, Batch, BatchStore, Listing, StoredFile, new_id
from cluster.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnsupportedError,
)
from cluster.gateway.batches.service import BatchService
from cluster.gateway.batches.uploads import Upload, receive_form
from cluster.gateway.messages import Request, Response, header, json_response, query_of
from cluster.gateway.router_links import RouterLinks

FILES_PATH = "/v1/files"
BATCHES_PATH = "/v1/batches"
MAX_LISTED = 100
DEFAULT_LISTED = 20
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
"""Entries of a batch's metadata, and characters of their keys and values."""
MAX_OPEN = 100
"""Batches of a tenant that have not ended."""
MAX_UPLOADS = 8
"""Files of a tenant that one router receives at once; ``max_tenant_bytes`` does not count them."""
READ_BYTES = 256 * 1024

_DAY_S = 24 * 3600
_WINDOW = re.compile(r"([1-9][0-9]{0,2})h")
MAX_WINDOW_H = 168
_ITEM = re.compile(r"/v1/(files|batches)/([A-Za-z0-9_.-]{1,128})(/content|/cancel)?")

Handler = Callable[[Request], Awaitable[Response]]


class FoundRoute(NamedTuple):
    """Route of a path."""

    route: str
    handler: Handler
    methods: tuple[str, ...]


class BatchRequest(msgspec.Struct):
    """Body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


_decode = msgspec.json.Decoder(BatchRequest).decode


class BatchRoutes:
    """Handlers of the paths.

    Args:
        service: Files and batches.
        routers: Links to the other routers; None if there is only one.
    """

    def __init__(self, service: BatchService, routers: RouterLinks | None) -> None:
        self._service = service
        self._routers = routers
        self._uploads: Counter[str] = Counter()

    @property
    def _store(self) -> BatchStore:
        return self._service.store

    def find(self, path: str) -> FoundRoute | None:
        """Return the route of a path; None for other paths."""
        if path == FILES_PATH:
            return FoundRoute(path, self._files, ("GET", "HEAD", "POST", "OPTIONS"))
        if path == BATCHES_PATH:
            return FoundRoute(path, self._batches, ("GET", "HEAD", "POST", "OPTIONS"))
        if (found := _ITEM.fullmatch(path)) is None:
            return None
        match found[1], found[3]:
            case "files", None:
                methods = "GET", "HEAD", "DELETE", "OPTIONS"
                return FoundRoute(f"{FILES_PATH}/{{file_id}}", self._file, methods)
            case "files", "/content":
                route = f"{FILES_PATH}/{{file_id}}/content"
                return FoundRoute(route, self._content, ("GET", "HEAD", "OPTIONS"))
            case "batches", None:
                route = f"{BATCHES_PATH}/{{batch_id}}"
                return FoundRoute(route, self._batch, ("GET", "HEAD", "OPTIONS"))
            case "batches", "/cancel":
                route = f"{BATCHES_PATH}/{{batch_id}}/cancel"
                return FoundRoute(route, self._cancel, ("POST", "OPTIONS"))
        return None

    # -- files --

    async def _files(self, request: Request) -> Response:
        self._check_nodes()
        if request.method == "POST":
            if self._uploads[request.tenant] >= MAX_UPLOADS:
                raise OverloadedError(
                    f"This tenant uploads {MAX_UPLOADS} files already; try again.", retry_after_s=1
                )
            self._uploads[request.tenant] += 1
            try:
                return await self._upload(request)
            finally:
                self._uploads[request.tenant] -= 1
        query = query_of(request)
        purpose = query.get("purpose")
        part = _listing(query)
        files = await self._service.threads.run(
            self._store.list_files, request.tenant, purpose, part
        )
        return _list_response([file.as_json() for file in files], part.limit)

    async def _upload(self, request: Request) -> Response:
        assert request.stream is not None  # ``Gateway.streams_body``
        limits, now = self._service.config.batches, int(self._service.clock())
        id_ = new_id("file-")
        part = self._store.part(id_)
        content_type = header(request.headers, b"content-type")
        limit = int(limits.max_file_bytes)
        upload = await receive_form(
            request.stream, content_type, part, limit, self._service.threads
        )
        try:
            expires_at = now + _kept_s(upload, limits.keep_days * _DAY_S)
            if (purpose := upload.fields.get("purpose")) != "batch":
                raise InvalidRequestError(
                    f"purpose: got {str(purpose)[:40]!r}; allowed: batch", param="purpose"
                )
            name = upload.filename or "input.jsonl"
            file = StoredFile(id_, request.tenant, name, "batch", upload.num_bytes, now, expires_at)
            add, allowed = self._store.add_file, int(limits.max_tenant_bytes)
            await self._service.threads.run(add, file, part, allowed)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return json_response(file.as_json())

    async def _file(self, request: Request) -> Response:
        if request.method != "DELETE":
            return json_response((await self._find_file(request)).as_json())
        self._check_nodes()
        id_ = _item_id(request)
        if not await self._service.threads.run(self._store.delete_file, id_, request.tenant):
            raise _no_file(id_)
        return json_response({"id": id_, "object": "file", "deleted": True})

    async def _content(self, request: Request) -> Response:
        file = await self._find_file(request)
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(file.bytes).encode()),
        ]
        try:
            content = await self._service.threads.run(self._store.open, file.id)
        except FileNotFoundError:  # deleted since it was found
            raise _no_file(file.id) from None
        return Response(200, headers, self._read(content))

    async def _read(self, content: IO[bytes]) -> AsyncGenerator[bytes, None]:
        with content:
            while chunk := await self._service.threads.run(content.read, READ_BYTES):
                yield chunk

    async def _find_file(self, request: Request, id_: str | None = None) -> StoredFile:
        self._check_nodes()
        id_ = id_ or _item_id(request)
        file = await self._service.threads.run(self._store.find_file, id_, request.tenant)
        if file is None:
            raise _no_file(id_)
        return file

    # -- batches --

    async def _batches(self, request: Request) -> Response:
        self._check_nodes()
        if request.method == "POST":
            return await self._create(request)
        part = _listing(query_of(request))
        batches = await self._service.threads.run(self._store.list_batches, request.tenant, part)
        return _list_response([self._as_json(batch) for batch in batches], part.limit)

    async def _create(self, request: Request) -> Response:
        try:
            body = _decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequestError(f"Invalid request body: {error}") from None
        if body.endpoint not in ENDPOINTS:
            allowed = ", ".join(ENDPOINTS)
            raise InvalidRequestError(
                f"endpoint: got {body.endpoint[:80]!r}; allowed: {allowed}", param="endpoint"
            )
        window_s = _window_s(body.completion_window)
        _check_metadata(body.metadata or {})
        file = await self._find_file(request, body.input_file_id)
        if file.purpose != "batch":
            raise InvalidRequestError(
                f"The purpose of {file.id} is {file.purpose}; upload it for `batch`.",
                param="input_file_id",
            )
        now, models = int(self._service.clock()), request.identity.models
        batch = Batch(
            id=new_id("batch_"),
            tenant=request.tenant,
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            created_at=now,
            expires_at=now + window_s,
            output_id=new_id("file-"),
            error_id=new_id("file-"),
            key=request.identity.key,
            models=None if models is None else tuple(sorted(models)),
            metadata=body.metadata,
        )
        await self._service.threads.run(self._store.add_batch, batch, MAX_OPEN)
        self._service.wake()
        return json_response(self._as_json(batch))

    async def _batch(self, request: Request) -> Response:
        return json_response(self._as_json(await self._find_batch(request)))

    async def _cancel(self, request: Request) -> Response:
        batch = await self._find_batch(request)
        now = int(self._service.clock())

        def cancel(found: Batch) -> Batch:
            cancelling_at = found.cancelling_at or now
            return msgspec.structs.replace(found, status="cancelling", cancelling_at=cancelling_at)

        changed = await self._service.threads.run(self._store.change_batch, batch.id, cancel)
        if changed is None or changed.status != "cancelling":
            raise InvalidRequestError(f"The batch is {batch.status} and cannot be cancelled.")
        self._service.wake()
        return json_response(self._as_json(changed))

    async def _find_batch(self, request: Request) -> Batch:
        self._check_nodes()
        id_ = _item_id(request)
        batch = await self._service.threads.run(self._store.find_batch, id_, request.tenant)
        if batch is None:
            raise NotFoundError(f"No such batch: {id_}.", param="batch_id")
        return batch

    def _as_json(self, batch: Batch) -> dict[str, Any]:
        return batch.as_json(self._service.backend.currency())

    def _check_nodes(self) -> None:
        """Raise if another router could not see what this one stores."""
        hosts = {link.host for link in self._routers.links().values()} if self._routers else set()
        own = self._routers.own_host if self._routers else None
        settings = self._service.config.batches
        is_shared = settings.database is not None or settings.directory is not None
        if not is_shared and own and hosts - {own}:
            raise UnsupportedError(
                "The routers run on several nodes. Set router.batches.database to a PostgreSQL "
                "database, or router.batches.directory to a directory that all of them share."
            )


def _item_id(request: Request) -> str:
    return request.path.split("/")[3]


def _no_file(id_: str) -> NotFoundError:
    return NotFoundError(f"No such file: {id_}.", param="file_id")


def _listing(query: dict[str, str]) -> Listing:
    limit = query.get("limit", str(DEFAULT_LISTED))
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= 10_000):
        raise InvalidRequestError(f"limit: got {limit[:40]!r}; allowed: 1 to 10000", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order: got {order[:40]!r}; allowed: asc, desc", param="order")
    count = min(int(limit[:6]), MAX_LISTED)
    return Listing(count, query.get("after"), is_ascending=order == "asc")


def _list_response(items: list[dict[str, Any]], limit: int) -> Response:
    ids = [item["id"] for item in items] or [None]
    body = {"object": "list", "data": items, "first_id": ids[0], "last_id": ids[-1]}
    return json_response({**body, "has_more": len(items) == limit})


def _check_metadata(metadata: dict[str, str]) -> None:
    fits = all(
        len(key) <= MAX_METADATA_KEY and len(value) <= MAX_METADATA_VALUE
        for key, value in metadata.items()
    )
    if len(metadata) > MAX_METADATA or not fits:
        raise InvalidRequestError(
            f"metadata may have {MAX_METADATA} entries, with keys of {MAX_METADATA_KEY} and values "
            f"of {MAX_METADATA_VALUE} characters.",
            param="metadata",
        )


def _window_s(window: str) -> int:
    found = _WINDOW.fullmatch(window)
    if found is None or int(found[1]) > MAX_WINDOW_H:
        raise InvalidRequestError(
            f"completion_window: got {window[:40]!r}; allowed: 1h to {MAX_WINDOW_H}h, such as 24h",
            param="completion_window",
        )
    return int(found[1]) * 3600


def _kept_s(upload: Upload, default_s: int) -> int:
    """Return the time for which a file is kept, in seconds."""
    seconds = upload.fields.get("expires_after[seconds]")
    if seconds is None:
        return default_s
    if not (seconds.isascii() and seconds.isdigit() and 3600 <= int(seconds[:9]) <= 30 * _DAY_S):
        raise InvalidRequestError(
            f"expires_after: got {seconds[:40]!r}; allowed: 3600 to {30 * _DAY_S} seconds",
            param="expires_after",
        )
    return min(int(seconds), default_s)
