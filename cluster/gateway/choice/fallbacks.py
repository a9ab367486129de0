"""Fallback models: an ordered list that is tried before a request fails."""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from cluster.config import FallbackReason, TandemConfig
from cluster.errors import (
    GuardBlockedError,
    OverloadedError,
    QuotaExhaustedError,
    RequestError,
    RequestTimeoutError,
    UnsupportedError,
)
from cluster.gateway.body import is_json, read_body
from cluster.gateway.messages import Request, Response, bytes_response, with_json_fields
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.selection import find_pool
from cluster.metrics import Registry, table
from cluster.routing import RequestBody

logger = logging.getLogger("ray.serve.tandem")

FALLBACK_HEADER = b"x-tandem-fallback"
Relay = Callable[[Request, RequestBody, Pool], Awaitable[Response]]
"""Relays a request to one pool."""


class _Candidate(NamedTuple):
    model: str | None
    """Name for the body; None: the one that it has."""
    pool: Pool


class Fallbacks:
    """Fallback models of all generators of one router."""

    def __init__(self, config: TandemConfig, pools: Mapping[str, Pool], registry: Registry) -> None:
        self._pools = pools
        self._registry = registry
        self.reconfigure(config)

    def reconfigure(self, config: TandemConfig) -> None:
        """Apply changed lists; requests that run keep theirs."""
        self._lists = {pool.name: pool for pool in config.generators if pool.fallbacks}

    def apply(self, request: Request, body: RequestBody, pool: Pool) -> bool:
        """Return True if other models may answer a request in place of its pool's."""
        if request.is_batch_line:  # it waits for its own model instead of delaying others
            return False
        return pool.name in self._lists and request.method == "POST" and is_json(body)

    async def relay(
        self, request: Request, body: RequestBody, pool: Pool, relay: Relay
    ) -> Response:
        """Return the answer of the pool, or that of its first fallback that can answer.

        Raises:
            RequestError: No model can answer; this is the error of the first one.
        """
        on = self._lists[pool.name].fallback_on
        candidates = [_Candidate(None, pool), *self._candidates(pool, request)]
        first: RequestError | Response | None = None
        reason: FallbackReason | None = None
        tried: list[str] = []
        for model, target in _with_answer(candidates, request):
            if reason is not None:
                self._count(pool, target, reason)
            # Relaying drops the body of its request, which the next model may need.
            attempt = replace(request)
            if model is not None:
                attempt = with_json_fields(attempt, {"model": model})
                body = read_body(attempt)
            found = await _try(relay, attempt, body, target)
            if isinstance(found, Response) and found.status < (400 if tried else 500):
                request.release_body()
                if tried:
                    found.headers.append((FALLBACK_HEADER, ", ".join(tried).encode()))
                return found
            first = found if first is None else first
            reason = _reason(found) or (reason if tried else None)
            if reason not in on:
                break
            tried.append(f"{target.name}={found.status}")
            logger.info("%s: %s answered with status %d", request.id, target.name, found.status)
        if isinstance(first, RequestError):
            raise first
        assert first is not None
        return first

    def _candidates(self, pool: Pool, request: Request) -> Iterator[_Candidate]:
        """Yield the fallbacks that the key allows and that have the path."""
        for model in self._lists[pool.name].fallbacks:
            target = find_pool(self._pools, model)
            assert target is not None  # the configuration was checked
            if request.identity.allows(*target.names_of(model)) and (
                target.serves(request.path) is not False
            ):
                yield _Candidate(model, target)

    def _count(self, pool: Pool, target: Pool, reason: FallbackReason) -> None:
        self._registry.counter(table.FALLBACKS, pool.name, target.name, reason).add()


async def _try(
    relay: Relay, request: Request, body: RequestBody, pool: Pool
) -> RequestError | Response:
    """Return the answer of one model, complete if it is an error of the server."""
    try:
        response = await relay(request, body, pool)
    except RequestTimeoutError:
        raise
    except RequestError as error:
        return error
    if response.status < 400:
        return response
    async with aclosing(response.body) as chunks:
        content = b"".join([chunk async for chunk in chunks])  # it is here already
    others = [pair for pair in response.headers if not pair[0].startswith(b"content-")]
    return bytes_response(response.status, b"application/json", content, others)


def _with_answer(candidates: Sequence[_Candidate], request: Request) -> Sequence[_Candidate]:
    """Return the model that has the answer to an earlier request with this key, or all of them."""
    key = request.answer_key
    if key is None:
        return candidates
    holders = [each for each in candidates if each.pool.replicas.find_answer(key.id) is not None]
    return holders[:1] or candidates


def _reason(found: RequestError | Response) -> FallbackReason | None:
    """Return why another model may answer; None if it would fail, too, or must not be asked."""
    if isinstance(found, QuotaExhaustedError) or found.status == UnsupportedError.status:
        return None
    if isinstance(found, GuardBlockedError):
        return "guard"
    if isinstance(found, OverloadedError):
        return "overload"
    return "failure" if found.status >= 500 else None
