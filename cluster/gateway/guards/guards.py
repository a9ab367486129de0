"""Selection of the guards of a request."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from cluster.admission import Identity
from cluster.config import GuardConfig, TandemConfig
from cluster.errors import InvalidRequestError, UnavailableError
from cluster.gateway.guards.checks import (
    Check,
    ClassifierCheck,
    Guard,
    PatternCheck,
    SendCheck,
)
from cluster.gateway.guards.session import GuardedRequest
from cluster.gateway.messages import Request, header
from cluster.gateway.pools.pool import Pool
from cluster.gateway.pools.selection import find_pool
from cluster.metrics import Registry
from cluster.routing import RequestBody

REQUESTED_HEADER = b"x-tandem-guards"
"""Header with further guards that a client asks for; it cannot omit those of its key."""
_WITHOUT_NEW_TEXT = frozenset(
    {
        *("/classify", "/detokenize", "/generative_scoring", "/pooling", "/rerank", "/score"),
        *("/tokenize", "/v1/chat/completions/derender", "/v1/chat/completions/render"),
        *("/v1/completions/derender", "/v1/completions/render", "/v1/embeddings"),
        *("/v1/messages/count_tokens", "/v1/messages/render", "/v1/models", "/v1/rerank"),
        *("/v1/responses/input_tokens", "/v1/responses/render", "/v1/score", "/v2/embed"),
        *("/v2/rerank", "/v1/responses/{response_id}/cancel", "/openapi.json"),
    }
)
"""Routes of generators that generate no text, or turn the client's own tokens into text."""


class Guards:
    """The guards of one router."""

    def __init__(
        self,
        config: TandemConfig,
        pools: Mapping[str, Pool],
        send: SendCheck,
        registry: Registry,
    ) -> None:
        self._pools = pools
        self._send = send
        self._registry = registry
        self.reconfigure(config)

    def reconfigure(self, config: TandemConfig) -> None:
        """Apply changed guards; requests that run keep those that they began with."""
        tasks = {name: pool.tasks for pool in config.classifiers for name in pool.model_names}
        self._guards = {
            guard.name: Guard(guard, self._make_check(guard, tasks), self._registry)
            for guard in config.guards
        }
        for guard in self._guards.values():
            for pool in self._pools.values():
                if pool.kind == "generator" and _is_about(guard.config, pool):
                    guard.create_series(pool.name)

    def may_apply(self, request: Request) -> bool:
        """Return False if no guards are configured, and neither key nor client names any."""
        return (
            bool(self._guards)
            or bool(request.identity.guards)
            or header(request.headers, REQUESTED_HEADER) is not None
        )

    def __iter__(self) -> Iterator[Guard]:
        return iter(self._guards.values())

    def _make_check(self, guard: GuardConfig, tasks: Mapping[str, Sequence[str]]) -> Check:
        name = guard.classifier
        if name is None:
            return PatternCheck(guard)
        pool = find_pool(self._pools, name)
        assert pool is not None  # the configuration was checked
        entities = "token-classification" in tasks[name]
        return ClassifierCheck(guard, pool, self._send, entities=entities)

    def guards_of(
        self, identity: Identity, pool: Pool | None = None, more: Collection[str] = ()
    ) -> list[Guard]:
        """Return the guards of a key's requests, to one pool if given, and those in ``more``.

        Raises:
            UnavailableError: The key names a guard that is not configured.
        """
        named = identity.guards
        if named is not None and (missing := sorted(named - self._guards.keys())):
            raise UnavailableError(
                f"The API key names the guard `{missing[0]}`, which is not configured. Add it to "
                "`guards`, or change the key."
            )
        return [
            guard
            for guard in self._guards.values()
            if guard.name in more
            or (
                (guard.config.default if named is None else guard.name in named)
                and (pool is None or _is_about(guard.config, pool))
            )
        ]

    def check_names(self, names: Iterable[str], param: str) -> list[str]:
        """Return the names of guards that a request asks for.

        Raises:
            InvalidRequestError: A guard does not exist.
        """
        found = list(names)
        for name in found:
            if name not in self._guards:
                raise InvalidRequestError(
                    f"The guard `{name}` does not exist. Guards: "
                    f"{', '.join(self._guards) or 'none'}",
                    param=param,
                )
        return found

    def begin(self, request: Request, body: RequestBody, pool: Pool) -> GuardedRequest | None:
        """Return the guards' part in a request; None if no guard checks it.

        Raises:
            InvalidRequestError: The request asks for a guard that does not exist.
            UnavailableError: See ``guards_of``.
        """
        if pool.kind != "generator":
            return None
        values = [value for name, value in request.headers if name == REQUESTED_HEADER]
        names = [name.strip() for name in b",".join(values).decode("latin-1").split(",")]
        more = self.check_names(filter(None, names), REQUESTED_HEADER.decode())
        if not (guards := self.guards_of(request.identity, pool, more)):
            return None
        route = pool.route_of(request.path)
        if route in _WITHOUT_NEW_TEXT:
            return None
        return GuardedRequest(guards, request, body, pool)


def _is_about(guard: GuardConfig, pool: Pool) -> bool:
    # Adapters have names of their own, but their requests can be guarded by pool only.
    return guard.models is None or not set(guard.models).isdisjoint(pool.models)
