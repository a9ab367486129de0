"""Admission of a request: API key, allowed models, quotas, and its claim on the pool."""

import asyncio
from dataclasses import replace

from cluster.admission import MIN_PRIORITY, Identity
from cluster.config import RouterConfig
from cluster.errors import (
    ContextLengthError,
    InvalidRequestError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RequestError,
)
from cluster.gateway.admission.authenticator import Authenticator
from cluster.gateway.admission.quotas import QuotaTicket, TenantQuotas
from cluster.gateway.admission.response_ids import ResponseIds
from cluster.gateway.body import UNREAD_BODY
from cluster.gateway.messages import Headers, Request, header
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.selection import TOKENIZER_PATHS
from cluster.gateway.pools.slots import Claim
from cluster.key_file import KeySource
from cluster.periodic import run_in_daemon_thread
from cluster.routing import RequestBody
from cluster.routing.fingerprint import EMPTY_FINGERPRINT
from cluster.routing.request import SINGLE

TIMEOUT_HEADER = b"x-request-timeout-seconds"
PRIORITY_HEADER = b"x-tandem-priority"
SESSION_HEADER = b"x-session-id"
KEYS_WAIT_S = 0.2
"""Maximum time for which a reload of the keys delays the exchange of quotas, in seconds."""


class Admission:
    """Admission of requests to pools."""

    def __init__(
        self, authenticator: Authenticator, quotas: TenantQuotas, response_ids: ResponseIds
    ) -> None:
        self.authenticator = authenticator
        self.quotas = quotas
        self._response_ids = response_ids
        self._reading: asyncio.Future[bool] | None = None

    def reconfigure(
        self, router: RouterConfig, file: KeySource | None, *, needs_keys: bool
    ) -> None:
        """Replace keys and quotas at once; see ``Authenticator.reconfigure``."""
        self.authenticator.reconfigure(router, file, needs_keys=needs_keys)
        self.quotas.set_tenants(self.authenticator.identities)

    async def refresh_keys(self) -> None:
        """Apply changed keys and quotas; return soon even if the key file's disk hangs.

        A thread reads the file, which takes a second for thousands of keys. It is always the same
        one, so a disk that hangs holds one thread.
        """
        if self._reading is None:
            self._reading = run_in_daemon_thread(self.authenticator.refresh, "tandem-keys")
        await asyncio.wait([self._reading], timeout=KEYS_WAIT_S)
        if self._reading.done():
            reading, self._reading = self._reading, None
            if reading.result():
                self.quotas.set_tenants(self.authenticator.identities)

    def admit(
        self, request: Request, body: RequestBody, pool: Pool, joins: str | None = None
    ) -> tuple[Claim, QuotaTicket]:
        """Return the request's claim on its pool and the ticket of its tenant's quotas.

        Args:
            request: The request.
            body: Its body.
            pool: The pool that answers.
            joins: Replica that has the answer already; quotas do not limit this request.

        Raises:
            PermissionDeniedError: The API key does not allow the model.
            NotFoundError: The request refers to a stored response of another tenant.
            OverloadedError: A quota of the tenant is exhausted.
            InvalidRequestError: A header is invalid, or the prompt longer than the context.
            PayloadTooLargeError: The request is larger than the queue.
        """
        try:
            return self._admit(request, body, pool, joins)
        except RequestError as error:
            pool.meter.reject(request, pool.route_of(request.path), error.status)
            raise

    def change(self, claim: Claim, request: Request, body: RequestBody, pool: Pool) -> Claim:
        """Return the claim of an admitted request whose body guards have changed.

        Raises:
            InvalidRequestError: The prompt is longer than the context.
            PayloadTooLargeError: The request is larger than the queue.
        """
        changed = _claim(request, body, pool, pool.names_of(body.model or pool.name)[0])
        _check_size(changed, pool, may_exceed_context=body.is_truncated)
        return replace(
            changed,
            joins=claim.joins,
            deadline_s=claim.deadline_s,
            expires_s=min(changed.expires_s, claim.deadline_s),
        )

    def _admit(
        self, request: Request, body: RequestBody, pool: Pool, joins: str | None
    ) -> tuple[Claim, QuotaTicket]:
        identity, model = request.identity, pool.names_of(body.model or pool.name)[0]
        _check_models(identity, body, pool)
        self._response_ids.check(request, body)
        claim = _claim(request, body, pool, model)
        _check_size(claim, pool, may_exceed_context=body.is_truncated)
        if joins is not None:
            return replace(claim, joins=joins), self.quotas.join(identity, model)
        # The calls of a task are charged instead, except those that only count tokens.
        counts_tokens = identity.is_delegated and request.path in TOKENIZER_PATHS
        if pool.kind == "application" or counts_tokens:
            return claim, self.quotas.admit(identity, model, (0.0, 0.0))
        tokens = claim.work_tokens, claim.view.prompt_tokens
        is_batch_line = request.is_batch_line
        ticket = self.quotas.admit(identity, model, tokens, is_batch_line=is_batch_line)
        return claim, ticket


def _check_models(identity: Identity, body: RequestBody, pool: Pool) -> None:
    if pool.kind == "application":  # each of its calls is checked
        return
    # An unread body may name any of the pool's models, so all of them must be allowed.
    for name in pool.models if body is UNREAD_BODY else (body.model or pool.name,):
        if not identity.allows(*pool.names_of(name)):
            raise PermissionDeniedError(
                f"The API key does not allow the model `{name}`.", param="model"
            )


def _claim(request: Request, body: RequestBody, pool: Pool, model: str) -> Claim:
    prompt, fan_out = EMPTY_FINGERPRINT, SINGLE
    if pool.kind == "generator":  # classifiers work in proportion to the body
        prompt, fan_out = body.fingerprint(), body.fan_out
    view = pool.estimator.view_request(
        len(request.body),
        prompt,
        header(request.headers, SESSION_HEADER),
        body.completion_limit,
        streamed=body.stream is True,
        fan_out=fan_out,
        adapter=pool.needs_adapter(model),
    )
    if body.prompt_limit is not None:
        prompt_tokens = min(view.prompt_tokens, body.prompt_limit * body.fan_out.prompts)
        view = replace(view, prompt_tokens=prompt_tokens)
    timeout_s = requested_timeout_s(request.headers)
    now_s = asyncio.get_running_loop().time()
    deadline_s = float("inf") if timeout_s is None else now_s + timeout_s
    return Claim(
        identity=request.identity,
        work_tokens=pool.estimator.work_tokens(view),
        body_bytes=len(request.body),
        priority=_requested_priority(request.headers, request.identity),
        expires_s=min(now_s + pool.queue_timeout_s, deadline_s),
        deadline_s=deadline_s,
        view=view,
        prompt=prompt,
        adapter=model if model in pool.limits.adapters else None,
    )


def _check_size(claim: Claim, pool: Pool, *, may_exceed_context: bool) -> None:
    """Raise if the request can never be served."""
    num_sequences, max_sequences = claim.view.fan_out.sequences, pool.limits.max_sequences
    if max_sequences is not None and num_sequences > max_sequences:
        raise InvalidRequestError(
            f"The request has {num_sequences} sequences (prompts * n); the limit is "
            f"{max_sequences} (router.max_sequences_per_request). Split the request.",
            param="n" if claim.view.fan_out.prompts == 1 else None,
        )
    if not may_exceed_context and pool.estimator.exceeds_context(claim.prompt):
        raise ContextLengthError(
            f"The prompt is longer than the model's context of "
            f"{pool.estimator.context_tokens:.0f} tokens.",
            param="prompt" if claim.prompt.is_tokens else None,
        )
    # Without the context, the estimate may be far off: an image has few tokens for its bytes.
    is_limited = pool.estimator.context_tokens < float("inf") or pool.kind != "generator"
    if is_limited and claim.work_tokens > pool.limits.queue.tokens:
        raise PayloadTooLargeError(
            f"The estimated work of the request is {claim.work_tokens:.0f} tokens; the limit is "
            f"{pool.limits.queue.tokens:.0f} (router.max_queued_tokens). Split the request."
        )


def requested_timeout_s(headers: Headers) -> float | None:
    """Return the client's timeout in seconds; None if it set none.

    Raises:
        InvalidRequestError: The header is not a positive number.
    """
    value = header(headers, TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = 0.0
    if not 0 < timeout_s < float("inf"):
        name = TIMEOUT_HEADER.decode()
        raise InvalidRequestError(f"{name} must be a number of seconds above 0", param=name)
    return timeout_s


def _requested_priority(headers: Headers, identity: Identity) -> int:
    """Return the requested priority, limited to that of the key."""
    value = header(headers, PRIORITY_HEADER)
    if value is None:
        return identity.priority
    try:
        return max(MIN_PRIORITY, min(int(value), identity.priority))
    except ValueError:
        name = PRIORITY_HEADER.decode()
        raise InvalidRequestError(f"{name} must be an integer", param=name) from None
