"""Handlers of the paths that the router answers itself."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from itertools import chain
from operator import is_not
from typing import Any, NamedTuple

import msgspec

from cluster.admission import MAX_PRIORITY
from cluster.errors import NotFoundError, TandemError
from cluster.gateway.admission.budgets import SPEND_PATH
from cluster.gateway.admission.quotas import TenantQuotas
from cluster.gateway.batches import BatchRoutes
from cluster.gateway.builtin.drain import DRAIN_PATH, Drains
from cluster.gateway.builtin.guards import GUARDS_PATH, GuardRoutes
from cluster.gateway.builtin.openapi import make_document
from cluster.gateway.builtin.operations import ClusterControl, OperationRoutes
from cluster.gateway.builtin.own_paths import (
    BATCH_PATHS,
    MODEL_PATH,
    ROLLOUT_PATH,
    ROLLOUTS_PATH,
)
from cluster.gateway.builtin.pages import Pages
from cluster.gateway.builtin.rollouts import RolloutControl, RolloutRoutes
from cluster.gateway.guards import Guards
from cluster.gateway.messages import Request, Response, bytes_response, header, json_response
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.relay import relay
from cluster.gateway.pools.slots import Claim
from cluster.gateway.reporting.dashboard import DATA_PATH, REPORT_PATH, Dashboard
from cluster.gateway.reporting.usage_report import COPIES_PATH, ROWS_PATH, UsageReport
from cluster.metrics import Registry, exposition
from cluster.metrics.exposition import CONTENT_TYPE
from cluster.operator_api import KEY_PATH, KEYS_PATH, LOGS_PATH

logger = logging.getLogger("ray.serve.tandem")

REPLICA_TIMEOUT_S = 1.0
"""Longest wait for a replica's answer when the router queries one."""
DOCUMENT_TIMEOUT_S = 10.0
"""Longest wait for its first OpenAPI document: vLLM's takes 1 s of CPU time."""
CACHE_S = 2.0
"""Time for which a replica's answer is cached, to limit the load by clients that poll."""

_DOCUMENT_PATH = "/openapi.json"
_MODEL_PREFIX = MODEL_PATH.removesuffix("{model}")

READ_METHODS = ("GET", "HEAD", "OPTIONS")
WRITE_METHODS = ("POST", "OPTIONS")

Handler = Callable[[Request], Awaitable[Response]]


_CAPABILITIES = {"embed": "/embeddings", "classify": "/classify", "rerank": "/rerank"}
"""Infinity's names of what a model does, and the path of each."""


class BuiltinRoute(NamedTuple):
    """One of the router's paths."""

    route: str
    """Template of the path."""
    handler: Handler
    methods: tuple[str, ...] = READ_METHODS


class _CachedAnswer(NamedTuple):
    replicas: tuple[str, ...]
    """Running replicas at that time; when they change, one is queried again."""
    expires_s: float
    answer: Any


class BuiltinRoutes:
    """Routing table and handlers of the built-in paths."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        versions: Mapping[str, str],
        registry: Registry,
        dashboard: Dashboard,
        usage: UsageReport | None,
        rollout_control: RolloutControl | None,
        control: ClusterControl | None,
    ) -> None:
        self._pools = pools
        self._versions = versions
        self._registry = registry
        self._created = int(time.time())
        self._cache: dict[tuple[str, str], _CachedAnswer] = {}
        self._document: tuple[list[Any], bytes] = [], b""  # of the engines, and the merged one
        self._queries: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._rollouts = RolloutRoutes(rollout_control)
        self._operations = OperationRoutes(control)
        self._batches: BatchRoutes | None = None
        self._handlers: dict[str, Handler] = {
            "/health": self._health,
            "/ready": self._ready,
            "/version": self._version,
            "/v1/models": self._list_models,
            "/models": self._list_capabilities,
            _DOCUMENT_PATH: self._openapi,
            ROLLOUTS_PATH: self._rollouts.show,
            KEYS_PATH: self._operations.keys,
            LOGS_PATH: self._operations.logs,
            "/metrics": self._metrics,
            DATA_PATH: dashboard.data,
            REPORT_PATH: dashboard.report,
        }
        if usage is not None:
            self._handlers |= {
                "/v1/usage": usage.handle,
                ROWS_PATH: usage.answer_router,
                COPIES_PATH: usage.answer_router_with_copies,
                SPEND_PATH: usage.budgets.answer_router,
            }

    def add_pages(self, pages: Pages) -> None:
        self._handlers |= pages.handlers

    def add_drains(self, drains: Drains) -> None:
        self._handlers[DRAIN_PATH] = drains.handle

    def add_guards(self, guards: Guards, quotas: TenantQuotas) -> None:
        self._handlers[GUARDS_PATH] = GuardRoutes(guards, quotas).test

    def add_batches(self, batches: BatchRoutes) -> None:
        self._batches = batches

    async def close(self) -> None:
        """Cancel the queries at replicas."""
        queries = list(self._queries.values())
        for query in queries:
            query.cancel()
        await asyncio.gather(*queries, return_exceptions=True)

    def find(self, path: str) -> BuiltinRoute | None:
        """Return the built-in route of a path, or None if the engines answer it."""
        if path.startswith(_MODEL_PREFIX):
            return BuiltinRoute(MODEL_PATH, self._get_model)
        if path.startswith(f"{ROLLOUTS_PATH}/"):
            return BuiltinRoute(ROLLOUT_PATH, self._rollouts.change, WRITE_METHODS)
        if path.startswith(f"{KEYS_PATH}/"):
            return BuiltinRoute(KEY_PATH, self._operations.revoke, ("DELETE", "OPTIONS"))
        if path == KEYS_PATH:
            return BuiltinRoute(path, self._operations.keys, (*READ_METHODS, "POST"))
        if self._batches is not None and (found := self._batches.find(path)) is not None:
            return BuiltinRoute(*found)
        handler = self._handlers.get(path)
        methods = WRITE_METHODS if path in (DRAIN_PATH, GUARDS_PATH) else READ_METHODS
        return None if handler is None else BuiltinRoute(path, handler, methods)

    async def _health(self, _request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        pools = {name: pool.status() for name, pool in self._pools.items()}
        ready = all(pool["ready"] or pool["asleep"] for pool in pools.values())
        body: dict[str, Any] = {"status": "ready" if ready else "not ready"}
        if request.identity.sees_all:
            body["pools"] = pools
        return json_response(body, 200 if ready else 503)

    async def _version(self, _request: Request) -> Response:
        # vLLM's name of the server's version, which clients of other servers read.
        versions = {"version": self._versions.get("tandem", ""), **self._versions}
        for pool in self._pools.values():
            for replica in pool.replicas.running:
                versions.update(replica.info.versions)
        return json_response(versions)

    async def _metrics(self, request: Request) -> Response:
        tenant = None if request.identity.sees_all else request.tenant
        return bytes_response(200, CONTENT_TYPE, exposition(self._registry, tenant))

    async def _list_models(self, request: Request) -> Response:
        pools = self._allowed_pools(request)
        lists = await asyncio.gather(*(self._model_cards(pool, request) for pool in pools))
        cards = list(chain.from_iterable(lists))
        body: dict[str, Any] = {"object": "list", "data": cards}
        if _is_anthropics(request):
            ids = [card["id"] for card in cards] or [None]
            cards = [_anthropic_card(card) for card in cards]
            body |= {"data": cards, "has_more": False, "first_id": ids[0], "last_id": ids[-1]}
        return json_response(body)

    async def _list_capabilities(self, request: Request) -> Response:
        cards: list[dict[str, Any]] = []
        for pool in self._allowed_pools(request):
            known = [name for name, path in _CAPABILITIES.items() if pool.serves(path)]
            extra = {"backend": "tandem", "capabilities": known, "stats": {}}
            cards += [{**card, **extra} for card in await self._model_cards(pool, request)]
        return json_response({"object": "list", "data": cards})

    async def _get_model(self, request: Request) -> Response:
        name = request.path.removeprefix(_MODEL_PREFIX)
        pools = self._allowed_pools(request)
        for pool in pools:
            for card in await self._model_cards(pool, request):
                if card["id"] == name:
                    return json_response(_anthropic_card(card) if _is_anthropics(request) else card)
        names = [name for pool in pools for name in _allowed_models(pool, request)]
        raise NotFoundError(
            f"The model `{name}` does not exist. Known models: {', '.join(sorted(names))}"
        )

    def _allowed_pools(self, request: Request) -> list[Pool]:
        """Return the pools with at least one model that the API key allows."""
        return [pool for pool in self._pools.values() if _allowed_models(pool, request)]

    async def _model_cards(self, pool: Pool, request: Request) -> list[dict[str, Any]]:
        """Return the engine's description of each model, or a minimal one if it cannot answer."""
        cards = {}
        if pool.serves("/v1/models"):
            listing = await self._query(pool, request, "/v1/models")
            cards = (
                {}
                if listing is None
                else {
                    # vLLM's root is the path of the model's files on the server.
                    card["id"]: {**card, "root": pool.names_of(card["id"])[0]}
                    for card in listing["data"]
                }
            )
        models = _allowed_models(pool, request)
        return [cards.get(model) or self._minimal_card(pool, model) for model in models]

    def _minimal_card(self, pool: Pool, model: str) -> dict[str, Any]:
        card = {"id": model, "object": "model", "created": self._created, "owned_by": "tandem"}
        return {**card, "root": pool.names_of(model)[0]}

    async def _openapi(self, request: Request) -> Response:
        documents = await asyncio.gather(
            *(self._query(pool, request, _DOCUMENT_PATH) for pool in self._pools.values())
        )
        known, content = self._document
        # Engines' documents are cached, so the same objects make the same document. Its 0.5 MB take
        # 5 ms on the event loop; json.dumps would take more.
        if len(known) != len(documents) or any(map(is_not, known, documents)):
            batches = () if self._batches is None else BATCH_PATHS
            version, own = (
                self._versions.get("tandem", ""),
                (*self._handlers, MODEL_PATH, KEY_PATH, *batches),
            )
            content = msgspec.json.encode(make_document(version, own, filter(None, documents)))
            self._document = documents, content
        return bytes_response(200, b"application/json", content)

    async def _query(self, pool: Pool, request: Request, path: str) -> Any:
        """Return a replica's JSON answer to a GET, or the last good one if none can answer now.

        None if there was no answer yet. Concurrent callers share one query.
        """
        key = (pool.name, path)
        replicas = tuple(replica.info.id for replica in pool.replicas.running)
        cached = self._cache.get(key)
        if pool.is_asleep or not replicas:  # not worth starting a replica, or waiting for one
            return cached and cached.answer
        now_s = asyncio.get_running_loop().time()
        if cached is not None and cached.replicas == replicas and now_s < cached.expires_s:
            return cached.answer
        query = self._queries.get(key)
        if query is None:
            is_first = path == _DOCUMENT_PATH and cached is None
            timeout_s = DOCUMENT_TIMEOUT_S if is_first else REPLICA_TIMEOUT_S
            query = asyncio.create_task(self._query_replica(pool, request.id, path, timeout_s))
            self._queries[key] = query
            query.add_done_callback(lambda _: self._queries.pop(key))
        answer = await asyncio.shield(query)
        is_final = path == _DOCUMENT_PATH and answer is not None  # it does not change
        if answer is None and cached is not None:
            answer = cached.answer  # also for the next callers: they need not wait again
        if answer is not None:
            lifetime_s = math.inf if is_final else CACHE_S
            expires_s = asyncio.get_running_loop().time() + lifetime_s
            self._cache[key] = _CachedAnswer(replicas, expires_s, answer)
        return answer

    async def _query_replica(self, pool: Pool, request_id: str, path: str, timeout_s: float) -> Any:
        query = Request(request_id, "GET", path, b"", [(b"accept", b"application/json")], b"")
        expires_s = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(expires_s):
                claim = Claim(priority=MAX_PRIORITY, expires_s=expires_s)
                response = await relay(query, pool, claim)
                async with aclosing(response.body) as body:
                    content = b"".join([chunk async for chunk in body])
            return json.loads(content) if response.status == 200 else None
        except (TandemError, ValueError, TimeoutError) as error:
            reason = str(error) or f"no answer within {timeout_s:g} s"
            logger.warning("%s: GET %s at pool %s failed: %s", request_id, path, pool.name, reason)
            return None


def _is_anthropics(request: Request) -> bool:
    return header(request.headers, b"anthropic-version") is not None


def _anthropic_card(card: dict[str, Any]) -> dict[str, Any]:
    """Return a model's description with Anthropic's fields, too."""
    created_at = datetime.fromtimestamp(card.get("created") or 0, UTC).isoformat()
    return {**card, "type": "model", "display_name": card["id"], "created_at": created_at}


def _allowed_models(pool: Pool, request: Request) -> list[str]:
    """Return the names in a pool that the request's API key allows."""
    return [name for name in pool.models if request.identity.allows(*pool.names_of(name))]
