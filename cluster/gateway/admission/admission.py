"""Who is let in: keys, models, limits, and each request's claim on its pool."""

import asyncio
from collections.abc import Iterable

from cluster.admission import Identity
from cluster.admission.leases import QuotaReport
from cluster.errors import PermissionDeniedError, RequestError
from cluster.gateway.admission.authenticator import Authenticator
from cluster.gateway.admission.quotas import QuotaTicket, TenantQuotas
from cluster.gateway.messages import Headers, Request, header
from cluster.gateway.pools.claim import SESSION_HEADER, Claim, asked_priority, asked_timeout_s
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.routes import OTHER
from cluster.gateway.pools.selection import UNREAD, Envelope
from cluster.routing import fingerprint
from cluster.routing.fingerprint import EMPTY_FINGERPRINT


class Admission:
    """Lets requests in, or says why not."""

    def __init__(self, authenticator: Authenticator, accounts: TenantQuotas) -> None:
        self._authenticator = authenticator
        self._accounts = accounts

    def authenticate(self, headers: Headers) -> Identity:
        """Whose request this is.

        Raises:
            AuthenticationError: it has no API key, or one that is not known.
        """
        return self._authenticator.check(headers)

    def refresh(self) -> None:
        """Look whether there are other keys or limits."""
        if self._authenticator.refresh():
            self._accounts.change(self._authenticator.identities)

    def enter(self, request: Request, envelope: Envelope, pool: Pool) -> tuple[Claim, QuotaTicket]:
        """What a request asks of its pool, and what its tenant's limits give it.

        Raises:
            PermissionDeniedError: its key does not allow the model.
            OverloadedError: a limit of its tenant is reached.
            InvalidRequestError: a header of it is wrong.
        """
        try:
            return self._enter(request, envelope, pool)
        except RequestError as error:
            pool.meter.refuse(request, pool.routes.find(request.path) or OTHER, error.status)
            raise

    def _enter(self, request: Request, envelope: Envelope, pool: Pool) -> tuple[Claim, QuotaTicket]:
        identity, model = request.identity, envelope.model or pool.name
        # What is not read may name any of the pool's models.
        for each in pool.models if envelope is UNREAD else (model,):
            if not identity.allows(each):
                raise PermissionDeniedError(
                    f"The API key does not allow the model `{each}`.", param="model"
                )
        text = (
            fingerprint(request.path, request.body)
            if pool.kind == "generator"
            else EMPTY_FINGERPRINT
        )
        view = pool.estimate.view_request(
            len(request.body),
            text,
            header(request.headers, SESSION_HEADER),
            envelope.most_tokens,
            streamed=envelope.stream is True,
            adapter=pool.needs_adapter(model),
        )
        work = pool.estimate.work_tokens(view)
        priority = asked_priority(request.headers, identity)
        timeout_s = asked_timeout_s(request.headers)
        now_s = asyncio.get_running_loop().time()
        expires_s, deadline_s = now_s + pool.queue_timeout_s, float("inf")
        if timeout_s is not None:
            deadline_s = now_s + timeout_s
            expires_s = min(expires_s, deadline_s)
        size = len(request.body)
        adapter = model if model in pool.limits.adapters else None
        claim = Claim(identity, work, size, priority, expires_s, deadline_s, view, text, adapter)
        return claim, self._accounts.enter(identity, model, work, view.prompt_tokens)

    def report(self, router: str) -> QuotaReport:
        """What the other routers are to know; settles this router's part of all limits."""
        return self._accounts.report(router)

    def set_peers(self, routers: Iterable[str]) -> None:
        """Take the names of the other routers that run."""
        self._accounts.peers.set_routers(frozenset(routers))

    def receive(self, report: QuotaReport, pools: Iterable[Pool]) -> None:
        """Take in another router's report: whom it served waits for the others here."""
        served = self._accounts.receive(report)
        for pool in pools:
            for (tenant, name), tokens in served.items():
                if name in pool.models:
                    pool.waiting.charge(tenant, tokens)
