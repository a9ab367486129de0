"""The paths that the router answers itself: health, versions, models, usage, OpenAPI, pages."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from cluster.admission import MAX_PRIORITY
from cluster.errors import NotFoundError, TandemError
from cluster.gateway.builtin.openapi import merge
from cluster.gateway.builtin.pages import Page
from cluster.gateway.messages import Request, Response, bytes_response, json_response
from cluster.gateway.pools.claim import Claim
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.relay import relay
from cluster.gateway.recording.usage import UsageAccount
from cluster.gateway.reporting.dashboard import DATA_PATH, REPORT_PATH, Dashboard
from cluster.metrics import Registry, exposition
from cluster.metrics.exposition import CONTENT_TYPE

logger = logging.getLogger("ray.serve.tandem")

PUBLIC_PATHS = frozenset({"/health", "/ready", "/version", "/explain", "/dashboard"})
"""Answered without an API key: what load balancers and probes ask for, and pages, which hold
nothing and send the key that is typed into them."""

MODEL_PREFIX = "/v1/models/"

ASK_TIMEOUT_S = 1.0
"""How long the router waits for a place at a replica that it asks about itself."""
KEPT_S = 2.0
"""How long its answer is kept, so that many who ask cost the replicas nothing."""

Handler = Callable[[Request], Awaitable[Response]]


class BuiltinRoute(NamedTuple):
    """One of the router's own paths."""

    route: str
    """The path as a template."""
    handler: Handler


class _Kept(NamedTuple):
    """What one of a pool's replicas said, and until when that is taken for true."""

    replicas: tuple[str, ...]
    until_s: float
    answer: Any


class BuiltinRoutes:
    """Finds and runs the router's own handlers."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        versions: Mapping[str, str],
        registry: Registry,
        dashboard: Dashboard,
        usage: UsageAccount | None,
    ) -> None:
        self._pools = pools
        self._versions = versions
        self._registry = registry
        self._created = int(time.time())
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._explain_page = Page("explain")
        self._dashboard_page = Page("dashboard")
        self._routes: dict[str, Handler] = {
            "/health": self._health,
            "/ready": self._ready,
            "/version": self._version,
            "/v1/models": self._models,
            "/openapi.json": self._openapi,
            "/metrics": self._metrics,
            "/explain": self._explain,
            "/dashboard": self._show_dashboard,
            DATA_PATH: dashboard.data,
            REPORT_PATH: dashboard.report,
        }
        if usage is not None:
            self._routes["/v1/usage"] = usage.answer

    def find(self, path: str) -> BuiltinRoute | None:
        """The route that ``path`` is; None where the path belongs to an engine."""
        if path.startswith(MODEL_PREFIX):
            return BuiltinRoute(MODEL_PREFIX + "{model}", self._model)
        handler = self._routes.get(path)
        return None if handler is None else BuiltinRoute(path, handler)

    async def _health(self, _request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, _request: Request) -> Response:
        pools = {name: pool.status() for name, pool in self._pools.items()}
        ready = all(pool["ready"] or pool["asleep"] for pool in pools.values())
        body = {"status": "ready" if ready else "not ready", "pools": pools}
        return json_response(body, 200 if ready else 503)

    async def _version(self, _request: Request) -> Response:
        versions = dict(self._versions)
        for pool in self._pools.values():
            for replica in pool.replicas:
                versions.update(replica.info.versions)
        return json_response(versions)

    async def _metrics(self, _request: Request) -> Response:
        return bytes_response(200, CONTENT_TYPE, exposition(self._registry))

    async def _models(self, request: Request) -> Response:
        allowed = self._allowed(request)
        lists = await asyncio.gather(*(self._models_of(pool, request) for pool in allowed))
        return json_response(
            {"object": "list", "data": [card for cards in lists for card in cards]}
        )

    async def _model(self, request: Request) -> Response:
        name = request.path.removeprefix(MODEL_PREFIX)
        for pool in self._allowed(request):
            for card in await self._models_of(pool, request):
                if card["id"] == name:
                    return json_response(card)
        models = (each for pool in self._allowed(request) for each in pool.models)
        known = ", ".join(sorted(each for each in models if request.identity.allows(each)))
        raise NotFoundError(f"The model `{name}` does not exist. Known models: {known}")

    def _allowed(self, request: Request) -> list[Pool]:
        """The pools of which its key may use a model."""
        allows = request.identity.allows
        return [pool for pool in self._pools.values() if any(map(allows, pool.models))]

    async def _models_of(self, pool: Pool, request: Request) -> list[dict[str, Any]]:
        """The cards of a pool's models: the engine's own where it has room to say them."""
        said = {}
        if pool.serves("/v1/models"):
            listed = await self._ask(pool, request, "/v1/models")
            said = {} if listed is None else {card["id"]: card for card in listed["data"]}
        models = filter(request.identity.allows, pool.models)
        return [said.get(model) or self._card(model) for model in models]

    def _card(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": self._created, "owned_by": "tandem"}

    async def _openapi(self, request: Request) -> Response:
        documents = [
            await self._ask(pool, request, "/openapi.json") for pool in self._pools.values()
        ]
        version = self._versions.get("tandem", "")
        return json_response(merge(version, [known for known in documents if known is not None]))

    async def _explain(self, _request: Request) -> Response:
        classifiers = [pool.name for pool in self._pools.values() if pool.kind == "classifier"]
        return self._explain_page.response(classifiers)

    async def _show_dashboard(self, _request: Request) -> Response:
        return self._dashboard_page.response(self._pools)

    async def _ask(self, pool: Pool, request: Request, path: str) -> Any:
        """The JSON answer of one of the pool's replicas to a GET; None if it cannot answer now."""
        if pool.asleep:  # nobody needs a replica for this
            return None
        now_s = asyncio.get_running_loop().time()
        replicas = tuple(replica.info.id for replica in pool.replicas)
        kept = self._kept.get((pool.name, path))
        if kept is not None and kept.replicas == replicas and now_s < kept.until_s:
            return kept.answer
        answer = await self._ask_replica(pool, request, path, now_s + ASK_TIMEOUT_S)
        if answer is not None:
            self._kept[pool.name, path] = _Kept(replicas, now_s + KEPT_S, answer)
        return answer

    async def _ask_replica(self, pool: Pool, request: Request, path: str, expires_s: float) -> Any:
        asked = Request(request.id, "GET", path, b"", [(b"accept", b"application/json")], b"")
        try:
            claim = Claim(priority=MAX_PRIORITY, expires_s=expires_s)
            response = await relay(asked, pool, claim)
            async with aclosing(response.body) as body:
                whole = b"".join([chunk async for chunk in body])
            return json.loads(whole) if response.status == 200 else None
        except (TandemError, ValueError) as error:
            logger.warning("%s: %s of %s: %s", request.id, path, pool.name, error)
            return None
