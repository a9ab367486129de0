"""From a request to its response: authenticate, pick the pool, admit, choose, relay."""

import asyncio
import logging
import time
from collections.abc import Mapping
from urllib.parse import quote

from cluster.config import TandemConfig
from cluster.errors import InternalError, MethodNotAllowedError, RequestError
from cluster.gateway.auth import Authenticator
from cluster.gateway.messages import Headers, Request, Response, error_response
from cluster.gateway.own import PUBLIC_PATHS, OwnRoutes
from cluster.gateway.pool import Pool, PoolLimits
from cluster.gateway.relay import relay
from cluster.gateway.surface import pick_pool, requested_model

logger = logging.getLogger("ray.serve.tandem")


class Gateway:
    """Answers every request of one router.

    Whoever owns it tells each of its ``pools`` which replicas run.
    """

    def __init__(
        self, config: TandemConfig, secret: bytes, versions: Mapping[str, str] | None = None
    ) -> None:
        self.max_body_bytes = int(config.router.max_body_bytes)
        self.pools = _make_pools(config, secret)
        self._authenticator = Authenticator(config.router.api_keys_sha256)
        self._own = OwnRoutes(self.pools, versions or {})

    def authenticate(self, path: str, headers: Headers) -> None:
        """Return if a request from outside the cluster may pass; asked before its body is read.

        Raises:
            AuthenticationError: it has no API key, or one that is not known.
        """
        if path not in PUBLIC_PATHS:
            self._authenticator.check(headers)

    async def respond(self, request: Request) -> Response:
        """The response to ``request``; errors come as responses too, never as exceptions."""
        started = time.perf_counter()
        try:
            response = await self._respond(request)
        except RequestError as error:
            response = error_response(error)
        except Exception:
            logger.exception("%s failed", request.id)
            response = error_response(InternalError(f"Internal error; request id {request.id}"))
        logger.info(
            "%s %s %s -> %d after %.1f ms",
            request.id,
            request.method,
            quote(request.path),
            response.status,
            (time.perf_counter() - started) * 1e3,
        )
        return response

    async def _respond(self, request: Request) -> Response:
        if (handler := self._own.find(request.path)) is not None:
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowedError(f"{request.path} takes GET, not {request.method}.")
            return await handler(request)
        pool = pick_pool(self.pools, request.path, requested_model(request))
        return await relay(request, pool)

    async def close(self) -> None:
        """Close every link."""
        await asyncio.gather(*(pool.close() for pool in self.pools.values()))


def _make_pools(config: TandemConfig, secret: bytes) -> dict[str, Pool]:
    def limits(max_ongoing: int) -> PoolLimits:
        return PoolLimits(max_ongoing, config.router.max_queued, config.router.queue_timeout_s)

    pools = [
        *(Pool(g.name, "generator", limits(g.max_ongoing), secret) for g in config.generators),
        *(Pool(c.name, "classifier", limits(c.max_ongoing), secret) for c in config.classifiers),
    ]
    return {pool.name: pool for pool in pools}
