"""From a request to its response: authenticate, pick the pool, admit, relay."""

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.admission import OPEN, Identity, QueueLimits
from cluster.config import PRIORITY_POLICY, ClassifierConfig, GeneratorConfig, TandemConfig
from cluster.errors import InternalError, MethodNotAllowedError, RequestError
from cluster.gateway.admission.admission import Admission
from cluster.gateway.admission.authenticator import Authenticator
from cluster.gateway.admission.quotas import TenantQuotas
from cluster.gateway.builtin.routes import PUBLIC_PATHS, BuiltinRoutes
from cluster.gateway.messages import Headers, Request, Response, error_response
from cluster.gateway.pools.engine_priority import PATHS, with_engine_priority
from cluster.gateway.pools.pool import Kind, Pool, PoolLimits, Wiring
from cluster.gateway.pools.relay import relay
from cluster.gateway.pools.routes import OTHER
from cluster.gateway.pools.selection import Envelope, read_envelope, select_pool
from cluster.gateway.recording.observer import Observers, PoolMeter
from cluster.gateway.recording.request_log import RequestLog, RequestRecord, outcome_of
from cluster.gateway.recording.usage import UsageAccount
from cluster.gateway.reporting.dashboard import Dashboard, ReadDecisions
from cluster.gateway.reporting.load_reports import LoadReports
from cluster.gateway.reporting.pool_gauges import watch_pools
from cluster.gateway.router_links import RouterLinks
from cluster.key_file import KeyFile
from cluster.metrics import Registry, table

if TYPE_CHECKING:
    from cluster.tracing.tracer import Tracer

logger = logging.getLogger("ray.serve.tandem")


class Gateway:
    """Answers every request of one router.

    Whoever owns it tells each of its ``pools`` which replicas run.

    Args:
        config: The whole deployment's.
        wirings: How each pool's replicas are reached, by the pool's name.
        versions: Of this router's parts, for ``/version``.
        key_file: Keys beside those of the configuration.
        tracer: What makes the spans of requests; None: they are not traced.
        usage: What remembers who used how much; None: nobody does.
        routers: The other routers, whose figures its dashboard shows too; None: it is alone.
        read_decisions: What its dashboard shows of autoscaling; None: there is none.
    """

    def __init__(
        self,
        config: TandemConfig,
        wirings: Mapping[str, Wiring],
        versions: Mapping[str, str] | None = None,
        key_file: KeyFile | None = None,
        tracer: "Tracer | None" = None,
        usage: UsageAccount | None = None,
        routers: RouterLinks | None = None,
        read_decisions: ReadDecisions | None = None,
    ) -> None:
        self.max_body_bytes = int(config.router.max_body_bytes)
        self.registry = Registry()
        """What this router counts."""
        router = config.router
        self._journal = RequestLog(router.log_requests_per_s, log_prompts=router.log_prompts)
        observers = Observers(self.registry, self._journal, tracer, usage)
        self.pools = _make_pools(config, wirings, observers)
        watch_pools(self.registry, self.pools.values())
        self._load_reports = LoadReports(config, self.pools)
        self._dashboard = Dashboard(
            self.registry, self.pools, self._journal, routers, read_decisions
        )
        key_hashes = router.api_keys_sha256 + router.operator_keys_sha256
        self.admission = Admission(Authenticator(key_hashes, key_file), TenantQuotas(self.registry))
        self._own = BuiltinRoutes(self.pools, versions or {}, self.registry, self._dashboard, usage)
        self._usage = usage

    def authenticate(self, path: str, headers: Headers) -> Identity:
        """Whose request this is; asked before its body is read, where it comes from outside.

        Raises:
            AuthenticationError: it has no API key, or one that is not known.
        """
        return OPEN if path in PUBLIC_PATHS else self.admission.authenticate(headers)

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
                envelope = read_envelope(request)
                pool = select_pool(self.pools, request.path, envelope.model)
            elif request.method not in ("GET", "HEAD"):
                raise MethodNotAllowedError(f"{request.path} takes GET, not {request.method}.")
            else:
                response = await own.handler(request)
                self._count(own.route, response.status)
                return response
        except RequestError as error:
            self.refuse(own.route if own else OTHER, error, request.id)
            raise
        return await self._relay(request, envelope, pool)

    async def _relay(self, request: Request, envelope: Envelope, pool: Pool) -> Response:
        claim, grant = self.admission.enter(request, envelope, pool)
        urgent = claim.priority != 0 or envelope.priority is not None
        if urgent and pool.limits.engine_priorities and request.path in PATHS:
            request = with_engine_priority(request, claim.priority)
        return await relay(request, pool, claim, grant)

    @property
    def num_open_requests(self) -> int:
        """Requests that wait in this router or that it gave to a replica."""
        return sum(pool.num_queued + pool.num_in_flight for pool in self.pools.values())

    def refuse(self, route: str, error: RequestError, request_id: str) -> None:
        """Count and log a request that never came to a pool."""
        self._count(route, error.status)
        outcome = outcome_of(error.status)
        self._journal.write(RequestRecord(request_id, route, error.status, outcome))

    def load_report(self, now: float, cpu_s: float) -> dict[str, float]:
        """What autoscaling is told of this router's traffic (``cluster.autoscaling.reports``).

        Args:
            now: Seconds, of any clock that only goes forward.
            cpu_s: CPU time that this process has used so far.
        """
        return self._load_reports.report(now, cpu_s)

    def _count(self, route: str, status: int) -> None:
        self.registry.counter(table.REQUESTS, "", route, str(status)).add()

    async def close(self) -> None:
        """Close every link, and write down what was used."""
        await self._dashboard.close()
        await asyncio.gather(*(pool.close() for pool in self.pools.values()))
        if self._usage is not None:
            await self._usage.close()


_OBSERVED_BY = {
    "ttft_p90": table.TTFT_SECONDS,
    "itl_p90": table.ITL_SECONDS,
    "latency_p95": table.REQUEST_SECONDS,
}


def _make_pools(
    config: TandemConfig, wirings: Mapping[str, Wiring], observers: Observers
) -> dict[str, Pool]:
    router = config.router

    def make(kind: Kind, pool: GeneratorConfig | ClassifierConfig) -> Pool:
        queue = QueueLimits(router.max_queued_tokens, router.max_queued)
        limits = PoolLimits(
            pool.max_in_flight,
            queue,
            router.queue_timeout_s,
            pool.routing,
            engine_priorities=_schedules_by_priority(pool),
            adapters=tuple(pool.adapters) if isinstance(pool, GeneratorConfig) else (),
            max_loras=pool.max_loras if isinstance(pool, GeneratorConfig) else 1,
            start_timeout_s=None if pool.replicas.min else router.start_timeout_s,
        )
        meter = PoolMeter(pool.name, observers)
        for name, limit_s in pool.slo:
            if limit_s is not None:
                of = name.removesuffix("_s")
                bound = _OBSERVED_BY[of].bound_above(limit_s)
                observers.registry.gauge(table.OBJECTIVE, pool.name, of).value = bound
        return Pool(pool.name, kind, limits, wirings[pool.name], meter)

    pools = [
        *(make("generator", pool) for pool in config.generators),
        *(make("classifier", pool) for pool in config.classifiers),
    ]
    return {pool.name: pool for pool in pools}


def _schedules_by_priority(pool: GeneratorConfig | ClassifierConfig) -> bool:
    if not isinstance(pool, GeneratorConfig) or pool.engine != "vllm":
        return False
    return bool(pool.engine_args.get("scheduling_policy", PRIORITY_POLICY) == PRIORITY_POLICY)
