"""From a request to its response: authenticate, pick the pool, admit, choose, relay."""

import asyncio
import logging
from collections.abc import Mapping

from cluster.config import ClassifierConfig, GeneratorConfig, TandemConfig
from cluster.errors import InternalError, MethodNotAllowedError, RequestError
from cluster.gateway.auth import Authenticator
from cluster.gateway.gauges import watch_pools
from cluster.gateway.load_report import LoadReports
from cluster.gateway.messages import Headers, Request, Response, error_response
from cluster.gateway.metering import PoolMeter
from cluster.gateway.own import PUBLIC_PATHS, OwnRoutes
from cluster.gateway.pool import Kind, Pool, PoolLimits, Wiring
from cluster.gateway.relay import relay
from cluster.gateway.routes import OTHER
from cluster.gateway.surface import pick_pool, requested_model
from cluster.metrics import Registry, table

logger = logging.getLogger("ray.serve.tandem")


class Gateway:
    """Answers every request of one router.

    Whoever owns it tells each of its ``pools`` which replicas run.

    Args:
        config: The whole deployment's.
        wirings: How each pool's replicas are reached, by the pool's name.
        versions: Of this router's parts, for ``/version``.
    """

    def __init__(
        self,
        config: TandemConfig,
        wirings: Mapping[str, Wiring],
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.max_body_bytes = int(config.router.max_body_bytes)
        self.registry = Registry()
        """What this router counts."""
        self.pools = _make_pools(config, wirings, self.registry)
        watch_pools(self.registry, self.pools.values())
        self._load_reports = LoadReports(config, self.pools)
        self._authenticator = Authenticator(config.router.api_keys_sha256)
        self._own = OwnRoutes(self.pools, versions or {}, self.registry)

    def authenticate(self, path: str, headers: Headers) -> str:
        """Whose request this is; asked before its body is read, where it comes from outside.

        Raises:
            AuthenticationError: it has no API key, or one that is not known.
        """
        return "" if path in PUBLIC_PATHS else self._authenticator.check(headers)

    async def respond(self, request: Request) -> Response:
        """The response to ``request``; errors come as responses too, never as exceptions."""
        try:
            return await self._respond(request)
        except RequestError as error:
            return error_response(error)
        except Exception:
            logger.exception("%s failed", request.id)
            return error_response(InternalError(f"Internal error; request id {request.id}"))

    async def _respond(self, request: Request) -> Response:
        own = self._own.find(request.path)
        try:
            if own is None:
                pool = pick_pool(self.pools, request.path, requested_model(request))
            elif request.method not in ("GET", "HEAD"):
                raise MethodNotAllowedError(f"{request.path} takes GET, not {request.method}.")
            else:
                response = await own.handler(request)
                self.count(own.route, response.status)
                return response
        except RequestError as error:
            self.count(own.route if own else OTHER, error.status)
            raise
        return await relay(request, pool)

    def load_report(self, now: float, cpu_s: float) -> dict[str, float]:
        """What autoscaling is told of this router's traffic (``cluster.autoscaling.reports``).

        Args:
            now: Seconds, of any clock that only goes forward.
            cpu_s: CPU time that this process has used so far.
        """
        return self._load_reports.report(now, cpu_s)

    def count(self, route: str, status: int) -> None:
        """Count a request that never came to a pool."""
        self.registry.counter(table.REQUESTS, "", route, str(status)).add()

    async def close(self) -> None:
        """Close every link."""
        await asyncio.gather(*(pool.close() for pool in self.pools.values()))


def _make_pools(
    config: TandemConfig, wirings: Mapping[str, Wiring], registry: Registry
) -> dict[str, Pool]:
    router = config.router

    def make(kind: Kind, pool: GeneratorConfig | ClassifierConfig) -> Pool:
        limits = PoolLimits(
            pool.max_ongoing,
            router.max_queued,
            router.queue_timeout_s,
            None if pool.replicas.min else router.start_timeout_s,
        )
        return Pool(pool.name, kind, limits, wirings[pool.name], PoolMeter(registry, pool.name))

    pools = [
        *(make("generator", pool) for pool in config.generators),
        *(make("classifier", pool) for pool in config.classifiers),
    ]
    return {pool.name: pool for pool in pools}
