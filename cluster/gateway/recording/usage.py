"""Usage of finished requests: hourly sums in a file, and ``GET /v1/usage``."""

import time
from collections.abc import Callable
from urllib.parse import parse_qsl

from cluster.accounting.usage import UsageSums, as_csv, as_json, parse_time
from cluster.accounting.usage_log import UsageLog
from cluster.admission import Identity
from cluster.config import AccountingConfig, TandemConfig
from cluster.errors import InvalidRequestError, PermissionDeniedError
from cluster.gateway.messages import Request, Response, bytes_response, json_response
from cluster.usage import Usage

DAY_S = 24 * 3600.0

_PARAMETERS = ("start", "end", "tenant", "format")


class UsageAccount:
    """Usage of one router's requests.

    Args:
        config: Configuration of the deployment.
        log: File with the hourly sums.
        clock: Unix time in seconds.
    """

    def __init__(
        self, config: TandemConfig, log: UsageLog, clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config.accounting
        self._log = log
        self._clock = clock

    @property
    def in_answers(self) -> bool:
        """True if every JSON response contains its usage."""
        return self._config.in_answers

    @property
    def currency(self) -> str | None:
        """Currency of costs; None if no price is configured."""
        has_prices = self._config.per_cpu_hour or self._config.per_gpu_hour
        return self._config.currency if has_prices else None

    def reconfigure(self, config: AccountingConfig) -> None:
        """Apply changed settings."""
        self._config = config
        self._log.keep_days = config.keep_days

    def start(self) -> None:
        """Start writing to the file periodically."""
        self._log.start()

    async def close(self) -> None:
        """Write what remains and close the file."""
        await self._log.close()

    def add(self, tenant: str, model: str, usage: Usage) -> None:
        """Add a finished request."""
        sums = UsageSums(
            1,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.joules or 0.0,
            usage.cost or 0.0,
        )
        self._log.add_request(tenant, model, usage.source, sums)

    async def handle(self, request: Request) -> Response:
        """Answer ``GET /v1/usage``.

        Raises:
            InvalidRequestError: A query parameter is invalid.
            PermissionDeniedError: The key may not read the usage of the requested tenant.
        """
        query = _query(request)
        end_s = parse_time(query["end"], "end") if "end" in query else self._clock()
        start_s = parse_time(query["start"], "start") if "start" in query else end_s - DAY_S
        if not start_s < end_s:
            raise InvalidRequestError("start must be before end", param="start")
        format_ = query.get("format", "json")
        if format_ not in ("json", "csv"):
            raise InvalidRequestError(
                f"format: got {format_[:40]!r}; allowed: json, csv", param="format"
            )
        tenant = _visible_tenant(request.identity, query.get("tenant"))
        rows = await self._log.find(start_s, end_s, tenant)
        if format_ == "csv":
            return bytes_response(200, b"text/csv; charset=utf-8", as_csv(rows).encode())
        return json_response(as_json(rows, self.currency))


def _visible_tenant(caller: Identity, requested: str | None) -> str | None:
    """Return the tenant to show, or None for all tenants."""
    if caller.sees_all or requested == caller.tenant.name:
        return requested
    if requested is not None:
        raise PermissionDeniedError(
            "This key may read only its own tenant's usage.", param="tenant"
        )
    return caller.tenant.name


def _query(request: Request) -> dict[str, str]:
    query = dict(parse_qsl(request.query.decode("latin-1"), keep_blank_values=True))
    for name in query:
        if name not in _PARAMETERS:
            raise InvalidRequestError(
                f"Unknown parameter: {name[:40]!r}; allowed: {', '.join(_PARAMETERS)}", param=name
            )
    return query
