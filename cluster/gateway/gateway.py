"""The path of a request through one router; read ``Gateway.respond`` from top to bottom."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from secrets import token_bytes
from time import perf_counter
from typing import TYPE_CHECKING

from cluster.admission import ANONYMOUS, Identity
from cluster.config import RouterConfig, TandemConfig
from cluster.errors import (
    AuthenticationError,
    InternalError,
    MethodNotAllowedError,
    RequestError,
    RequestTimeoutError,
)
from cluster.gateway.admission.admission import Admission, requested_timeout_s
from cluster.gateway.admission.answer_keys import KEY_HEADER, AnswerKeys, find_answer
from cluster.gateway.admission.authenticator import Authenticator
from cluster.gateway.admission.budgets import Budgets
from cluster.gateway.admission.quotas import QuotaTicket, TenantQuotas
from cluster.gateway.admission.response_ids import ResponseIds
from cluster.gateway.batches import FILES_PATH, BatchBackend, BatchRoutes, BatchService
from cluster.gateway.body import UNREAD_BODY, BodyBuffers, read_body
from cluster.gateway.builtin.drain import Drains, NodeDrains
from cluster.gateway.builtin.operations import ClusterControl
from cluster.gateway.builtin.own_paths import PUBLIC_PATHS
from cluster.gateway.builtin.pages import Pages
from cluster.gateway.builtin.rollouts import RolloutControl
from cluster.gateway.builtin.routes import BuiltinRoute, BuiltinRoutes
from cluster.gateway.choice import CHOICE_HEADER, AutoChoice, Fallbacks
from cluster.gateway.form import FormBody
from cluster.gateway.guards import Guards
from cluster.gateway.messages import (
    Headers,
    Request,
    Response,
    empty_response,
    error_response,
    header,
    with_json_fields,
)
from cluster.gateway.pools.factory import make_pools, make_rollouts, reconfigure_pools
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.relay import relay
from cluster.gateway.pools.replica import Wiring
from cluster.gateway.pools.rollout import ignore_end
from cluster.gateway.pools.routes import OTHER
from cluster.gateway.pools.selection import select_pool, split_model_path
from cluster.gateway.pools.slots import Claim
from cluster.gateway.recording.observer import OnEnd, RequestSinks
from cluster.gateway.recording.request_log import (
    CLIENT_DISCONNECTED,
    RequestLog,
    RequestRecord,
    outcome_of,
)
from cluster.gateway.recording.usage import UsageAccount
from cluster.gateway.reporting.dashboard import Dashboard, ReadDecisions
from cluster.gateway.reporting.load_reports import LoadReports
from cluster.gateway.reporting.pool_gauges import export_pool_gauges
from cluster.gateway.reporting.usage_report import UsageReport
from cluster.gateway.router_links import RouterLinks
from cluster.key_file import KeySource
from cluster.metrics import Registry, table
from cluster.routing import RequestBody
from cluster.routing.fingerprint import prepare_decoders
from cluster.usage import Usage

if TYPE_CHECKING:
    from cluster.tracing.tracer import Tracer

logger = logging.getLogger("ray.serve.tandem")


class Gateway:
    """Answers all requests of one router. Update its ``pools`` when the running replicas change.

    Args:
        config: Configuration of the deployment.
        wirings: How to reach each pool's replicas, by the pool's name.
        versions: Component versions for ``GET /version``.
        key_file: API keys in addition to the configuration's.
        tracer: Receives spans; None disables tracing.
        usage: Stores the usage of requests; None disables ``GET /v1/usage``.
        routers: Links to the other routers, for the dashboard; None if there is only one.
        nodes: Drains of Ray's nodes; None without Ray.
        read_decisions: Returns autoscaling's last decisions, for the dashboard.
        needs_keys: True if every request is rejected while no keys are configured.
        response_key: Key of the ids of stored responses, the same for all routers.
        rollout_control: Starts and changes rollouts; None without Ray Serve.
        batches: Files and batches; None disables them.
        control: Access to the key file and the logs of the cluster; None without Ray.
    """

    def __init__(
        self,
        config: TandemConfig,
        wirings: Mapping[str, Wiring],
        *,
        versions: Mapping[str, str] | None = None,
        key_file: KeySource | None = None,
        tracer: "Tracer | None" = None,
        usage: UsageAccount | None = None,
        routers: RouterLinks | None = None,
        nodes: NodeDrains | None = None,
        read_decisions: ReadDecisions | None = None,
        needs_keys: bool = False,
        response_key: bytes | None = None,
        rollout_control: RolloutControl | None = None,
        batches: BatchService | None = None,
        control: ClusterControl | None = None,
    ) -> None:
        router = config.router
        self.max_header_bytes = int(router.max_header_bytes)
        prepare_decoders()
        self.buffers = BodyBuffers(*_body_limits(router))
        self.client_timeout_s = router.client_timeout_s
        self.registry = Registry()
        """Metrics of this router."""
        self.request_log = RequestLog(router.log_requests_per_s, log_prompts=router.log_prompts)
        self._usage = usage
        self._sinks = sinks = RequestSinks(self.registry, self.request_log, tracer, usage)
        self.pools = make_pools(config, wirings, sinks)
        """All pools; those of new versions have a name that no client can send."""
        self.rollouts = make_rollouts(config, self.pools, self.registry)
        """Rollouts that divide the requests of a pool, by its name."""
        candidates = {rollout.new.name for rollout in self.rollouts.values()}
        self._models = {n: pool for n, pool in self.pools.items() if n not in candidates}
        export_pool_gauges(self.registry, self.pools.values())
        authenticator = Authenticator(
            router.api_keys_sha256,
            key_file,
            operator_hashes=router.operator_keys_sha256,
            needs_keys=needs_keys,
        )
        self._response_ids = ResponseIds(response_key or token_bytes(32))
        quotas = TenantQuotas(self.registry)
        self.budgets = quotas.budgets = Budgets(
            usage, routers, self.registry, lambda: authenticator.identities
        )
        if usage is not None:
            self.budgets.start()
        self.admission = Admission(authenticator, quotas, self._response_ids)
        self._answer_keys = AnswerKeys(config.idempotency)
        self._guards = Guards(config, self._models, self._send_check, self.registry)
        self._fallbacks = Fallbacks(config, self._models, self.registry)
        self._auto = AutoChoice(
            config, self._models, self._send_check, quotas.budget_used, self.registry
        )
        self._load_reports = LoadReports(config, self.pools)
        self._dashboard = Dashboard(self.pools, sinks, routers, read_decisions, self.budgets.report)
        report = UsageReport(usage, routers, self.budgets) if usage is not None else None
        self._builtin = BuiltinRoutes(
            self._models,
            versions or {},
            self.registry,
            self._dashboard,
            report,
            rollout_control,
            control,
        )
        self._builtin.add_pages(Pages(self._models, lambda: self._auto.is_configured))
        self._builtin.add_guards(self._guards, quotas)
        self._batches = batches
        if batches is not None:
            self._builtin.add_batches(BatchRoutes(batches, routers))
            batches.bind(self._batch_backend(quotas, usage))
        self._builtin.add_drains(Drains(self.pools, routers, nodes or NodeDrains()))

    def start_batches(self) -> None:
        """Run the batches that are open, and new ones."""
        if self._batches is not None:
            self._batches.start()

    async def close_batches(self) -> None:
        """Pass the batches on to another router."""
        if self._batches is not None:
            await self._batches.stop()

    def _batch_backend(self, quotas: TenantQuotas, usage: UsageAccount | None) -> BatchBackend:
        return BatchBackend(
            relay=self.relay,
            pools=self._models,
            registry=self.registry,
            find_identity=self.admission.authenticator.find_identity,
            num_elsewhere=quotas.num_elsewhere,
            currency=lambda: None if usage is None else usage.currency,
        )

    def reconfigure(
        self, config: TandemConfig, key_file: KeySource | None, *, needs_keys: bool
    ) -> None:
        """Apply another configuration with the same pools; running requests go on.

        Args:
            config: The configuration.
            key_file: Its key file, already read.
            needs_keys: See the class.
        """
        router = config.router
        self.max_header_bytes = int(router.max_header_bytes)
        self.buffers.set_limits(*_body_limits(router))
        self.client_timeout_s = router.client_timeout_s
        self.request_log.reconfigure(router.log_requests_per_s, log_prompts=router.log_prompts)
        if self._usage is not None:
            self._usage.reconfigure(config.accounting)
        reconfigure_pools(config, self.pools, self._sinks)
        self.admission.reconfigure(router, key_file, needs_keys=needs_keys)
        self._answer_keys.config = config.idempotency
        self._guards.reconfigure(config)
        if self._batches is not None:
            self._batches.reconfigure(router)
        self._fallbacks.reconfigure(config)
        self._auto.reconfigure(config)
        self._load_reports.reconfigure(config)

    def split_model_path(self, path: str) -> tuple[str, str | None]:
        """Return the path behind ``/models/{model}`` and the model; see ``split_model_path``."""
        return split_model_path(self._models, path)

    def authenticate(self, path: str, headers: Headers) -> Identity:
        """Return the sender of an HTTP request, before its body is read.

        Public paths need no key and show more with one.

        Raises:
            AuthenticationError: The API key is missing or unknown.
        """
        try:
            return self.admission.authenticator.authenticate(headers)
        except AuthenticationError:
            if path not in PUBLIC_PATHS:
                raise
            return ANONYMOUS

    def needs_body(self, method: str, path: str) -> bool:
        """Return False if the request is answered without its body."""
        if method in ("GET", "HEAD"):
            return False
        if (builtin := self._builtin.find(path)) is not None:
            return method in builtin.methods and method != "OPTIONS"
        return any(pool.serves(path) is not False for pool in self._models.values())

    def streams_body(self, method: str, path: str) -> bool:
        """Return True if the handler of a request reads its body piece by piece."""
        return method == "POST" and path == FILES_PATH and self._builtin.find(path) is not None

    async def respond(self, request: Request) -> Response:
        """Return the response to a request; errors become responses, never exceptions."""
        try:
            builtin = self._builtin.find(request.path)
            if builtin is not None:
                return await self._respond_builtin(request, builtin)
            return await self.relay(request)
        except RequestError as error:
            return error_response(error, request.path)
        except Exception:
            logger.exception("%s: internal error", request.id)
            internal = InternalError(f"Internal error; request id {request.id}")
            return error_response(internal, request.path)

    async def relay(self, request: Request) -> Response:
        """Return the response of the pool that serves a request.

        Raises:
            RequestError: The request is refused, or its replicas are lost.
        """
        if header(request.headers, KEY_HEADER) is None:
            return await self._relay(request)
        async with self._turn(request):
            return await self._relay(request)

    @asynccontextmanager
    async def _turn(self, request: Request) -> AsyncIterator[None]:
        """Read the request's idempotency key; wait while another request with it begins."""
        async with AsyncExitStack() as stack:
            try:
                key = request.answer_key = await self._answer_keys.read(request)
                if key is not None:
                    timeout_s = requested_timeout_s(request.headers)
                    await stack.enter_async_context(self._answer_keys.turn(key, timeout_s))
            except RequestError as error:
                self.record_rejection(request.path, error, request.id, request.tenant)
                raise
            yield

    async def _relay(self, request: Request) -> Response:
        body = self._read_body(request)
        choice = None
        if self._auto.applies(body):
            try:
                request, body, choice = await self._auto.choose(request, body)
            except RequestError as error:
                self.record_rejection(request.path, error, request.id, request.tenant)
                raise
        pool = self._select_pool(request, body)
        if self._fallbacks.apply(request, body, pool):
            response = await self._fallbacks.relay(request, body, pool, self._guard)
        else:
            relaying = self._guard(request, body, pool)
            del body  # the prompt; the answer may be far away
            response = await relaying
        if choice is not None:
            response.headers.append((CHOICE_HEADER, str(choice).encode()))
        return response

    async def _guard(self, request: Request, body: RequestBody, pool: Pool) -> Response:
        """Relay a request to a pool, and check it if guards apply."""
        guarded = None
        if self._guards.may_apply(request):
            try:
                guarded = self._guards.begin(request, body, pool)
            except RequestError as error:
                pool.meter.reject(request, pool.route_of(request.path), error.status)
                raise
        if guarded is None:
            relaying = self._admit(request, body, pool)
            del body
            return await relaying
        request.arrived_s = perf_counter()
        claim, ticket = self._claim(request, body, pool)
        try:
            async with asyncio.timeout_at(claim.deadline_s if claim.has_deadline else None):
                prepared = await guarded.prepare()
            if prepared is not request:
                request.release_body()
                body = read_body(prepared)
                claim = self.admission.change(claim, prepared, body, pool)
        except TimeoutError:
            late = RequestTimeoutError("The deadline passed while guards checked the prompt.")
            self._reject(request, pool, ticket, late)
            raise late from None
        except RequestError as error:
            self._reject(request, pool, ticket, error)
            raise
        except BaseException:
            ticket.end(CLIENT_DISCONNECTED, None, False)
            raise
        relaying = self._relay_admitted(prepared, body, pool, claim, ticket)
        del body
        return await guarded.respond(relaying)

    @staticmethod
    def _reject(request: Request, pool: Pool, ticket: QuotaTicket, error: RequestError) -> None:
        """Count an admitted request that guards refuse before it is relayed."""
        ticket.end(error.status, None, False)
        pool.meter.reject(request, pool.route_of(request.path), error.status)

    def _claim(self, request: Request, body: RequestBody, pool: Pool) -> tuple[Claim, QuotaTicket]:
        joins = self._find_answer(request, pool)
        return self.admission.admit(request, body, pool, joins)

    async def _admit(self, request: Request, body: RequestBody, pool: Pool) -> Response:
        """Admit a request and relay it."""
        claim, ticket = self._claim(request, body, pool)
        relaying = self._relay_admitted(request, body, pool, claim, ticket)
        del body
        return await relaying

    async def _relay_admitted(
        self, request: Request, body: RequestBody, pool: Pool, claim: Claim, ticket: QuotaTicket
    ) -> Response:
        relayed = with_json_fields(request, self._fields(request, body, pool, claim))
        del body
        if relayed is not request:
            request.release_body()
        on_end: OnEnd = ticket.end
        if request.on_usage is not None:  # a line of a batch
            on_end = partial(_end_line, ticket.end, request.on_usage)
        if (rollout := self.rollouts.get(pool.name)) is not None:
            return await rollout.relay(relayed, claim, on_end)
        return await relay(relayed, pool, claim, on_end)

    async def _send_check(self, request: Request, pool: Pool, claim: Claim) -> Response:
        """Relay a request of a guard, which no quota limits."""
        if (rollout := self.rollouts.get(pool.name)) is not None:
            return await rollout.relay(request, claim, ignore_end)
        return await relay(request, pool, claim, ignore_end)

    def _fields(
        self, request: Request, body: RequestBody, pool: Pool, claim: Claim
    ) -> dict[str, str | int]:
        """Return the fields of the engine's body that the router sets."""
        fields: dict[str, str | int] = {}
        if isinstance(body, FormBody):  # its type is known
            return fields
        # A client's own `priority` is overwritten: the API key limits it.
        has_priority = claim.priority != 0 or body.priority is not None or body is UNREAD_BODY
        if has_priority and pool.limits.engine_priorities:
            # vLLM runs the smallest value first; models without the field ignore it.
            fields["priority"] = -claim.priority
        if (response_id := self._response_ids.new_id(request)) is not None:
            fields["request_id"] = response_id
        return fields

    async def _respond_builtin(self, request: Request, builtin: BuiltinRoute) -> Response:
        try:
            if request.method == "OPTIONS":
                response = empty_response(204, [(b"allow", ", ".join(builtin.methods).encode())])
            elif request.method in builtin.methods:
                response = await builtin.handler(request)
            else:
                raise MethodNotAllowedError.for_path(request.path, request.method, builtin.methods)
        except RequestError as error:
            self.record_rejection(request.path, error, request.id, request.tenant)
            raise
        self._count(builtin.route, response.status)
        return response

    def _find_answer(self, request: Request, pool: Pool) -> str | None:
        """Return the replica with the answer to an earlier request with this key, if any."""
        if request.answer_key is None:
            return None
        rollout = self.rollouts.get(pool.name)
        pools = [pool] if rollout is None else [pool, rollout.new]
        try:
            return find_answer(request.answer_key, pools, self.pools.values())
        except RequestError as error:
            pool.meter.reject(request, pool.route_of(request.path), error.status, "rejected")
            raise

    def _read_body(self, request: Request) -> RequestBody:
        try:
            return read_body(request)
        except RequestError as error:
            self.record_rejection(request.path, error, request.id, request.tenant)
            raise

    def _select_pool(self, request: Request, body: RequestBody) -> Pool:
        try:
            # Load balancers probe this path; they must not wake a pool.
            if request.path == "/" and request.method != "POST":
                raise MethodNotAllowedError.for_path("/", request.method, ["POST"])
            return select_pool(self._models, request.path, body, request.model)
        except RequestError as error:
            self.record_rejection(request.path, error, request.id, request.tenant)
            raise

    @property
    def num_open_requests(self) -> int:
        """Requests in this router's queues and in flight at its replicas."""
        return sum(pool.num_queued + pool.num_in_flight for pool in self.pools.values())

    def record_rejection(
        self, path: str, error: RequestError, request_id: str, tenant: str
    ) -> None:
        """Count and log a request that was rejected before a pool was selected."""
        route = self._route_of(path)
        self._count(route, error.status)
        self._sinks.tenants.count(tenant, "", error.status)
        outcome = outcome_of(error.status)
        self.request_log.write(RequestRecord(request_id, route, error.status, outcome, tenant))

    def _route_of(self, path: str) -> str:
        builtin = self._builtin.find(path)
        if builtin is not None:
            return builtin.route
        routes = (pool.route_of(path) for pool in self._models.values())
        return next((route for route in routes if route != OTHER), OTHER)

    def load_report(self, now: float, cpu_s: float) -> dict[str, float]:
        """Return this router's load report for autoscaling (``cluster.autoscaling.reports``).

        Args:
            now: Monotonic time in seconds.
            cpu_s: CPU time used by this process, in seconds.
        """
        return self._load_reports.report(now, cpu_s)

    async def close(self) -> None:
        """Close every link and write the remaining usage."""
        if self._batches is not None:
            await self._batches.close()
        await asyncio.gather(*(rollout.close() for rollout in self.rollouts.values()))
        await self._dashboard.close()
        await self._builtin.close()
        await asyncio.gather(*(pool.close() for pool in self.pools.values()))
        await self.budgets.close()
        if self._usage is not None:
            await self._usage.close()

    def _count(self, route: str, status: int) -> None:
        self.registry.counter(table.REQUESTS, "", route, str(status)).add()


def _end_line(
    end: OnEnd, on_usage: Callable[[Usage], None], status: int, usage: Usage | None, had_slot: bool
) -> None:
    if usage is not None:
        on_usage(usage)
    end(status, usage, had_slot)


def _body_limits(router: RouterConfig) -> tuple[int, int, int, float]:
    return (
        int(router.max_body_bytes),
        int(router.max_buffered_bytes),
        int(router.min_upload_bytes_per_s),
        router.header_timeout_s,
    )
