"""Client of one Prometheus, with limits on time, concurrency and size."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from cluster.monitoring.panels.queries import TimeRange

MAX_CONCURRENT = 4
"""Most queries at a time; Prometheus runs at a lower priority than the engines."""
MAX_WAITING = 200
"""Most queries that wait; a dashboard has up to 40 visible queries."""
MAX_BODY_BYTES = 8_000_000
MAX_SERIES = 60
"""Most series of a query's result; further ones are counted only."""
MAX_OPTIONS = 200
"""Most values of a label that are listed."""
TIMEOUT_S = 15.0


class QueryError(Exception):
    """Query without a result, with the reason for the user."""


class BusyError(QueryError):
    """Too many queries wait."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one series at the steps of a range; None where it has none."""

    labels: Mapping[str, str]
    values: list[float | None]


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a query."""

    series: list[Series]
    num_omitted: int
    """Number of series beyond ``MAX_SERIES``."""


class Prometheus:
    """Read-only client.

    Args:
        http: Client whose ``base_url`` is that of Prometheus.
    """

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)
        self._waiting = 0

    async def query_range(self, expr: str, times: TimeRange) -> Result:
        """Return the values of ``expr`` at each step of ``times``."""
        span = {"start": times.start, "end": times.end, "step": times.step}
        data = await self._get("query_range", query=expr, **span)
        result = _matrix(data)
        kept = [_align(each, times) for each in result[:MAX_SERIES]]
        return Result(kept, len(result) - len(kept))

    async def query(self, expr: str, at: float) -> Result:
        """Return the values of ``expr`` at one time: one value for each series."""
        data = await self._get("query", query=expr, time=at)
        if data["resultType"] == "scalar":
            return Result([Series({}, [_number(data["result"][1])])], 0)
        result = data["result"]
        kept = [Series(each["metric"], [_number(each["value"][1])]) for each in result[:MAX_SERIES]]
        return Result(kept, len(result) - len(kept))

    async def label_values(self, label: str, match: str | None, times: TimeRange) -> list[str]:
        """Return the values of ``label`` in the series that ``match`` selects."""
        parameters: dict[str, Any] = {"start": times.start, "end": times.end}
        if match is not None:
            parameters["match[]"] = match
        data: list[str] = await self._get(f"label/{label}/values", **parameters)
        return data[:MAX_OPTIONS]

    async def _get(self, path: str, **parameters: Any) -> Any:
        """Return ``data`` of Prometheus' answer.

        Raises:
            QueryError: Prometheus is not reachable or slow, or its answer is an error or too large.
        """
        try:
            async with self._slot(), asyncio.timeout(TIMEOUT_S):
                body = await self._read(path, parameters)
        except TimeoutError:
            raise QueryError(f"Prometheus did not answer within {TIMEOUT_S:.0f} s") from None
        except httpx.HTTPError as error:
            raise QueryError(f"Prometheus does not respond ({type(error).__name__})") from None
        try:
            answer = json.loads(body)
            if answer["status"] == "success":
                return answer["data"]
            raise QueryError(f"Prometheus: {str(answer['error'])[:500]}")
        except (ValueError, KeyError, TypeError):
            raise QueryError("Prometheus' answer is not what its API describes") from None

    async def _read(self, path: str, parameters: Mapping[str, Any]) -> bytes:
        chunks, size = [], 0
        async with self._http.stream("GET", f"/api/v1/{path}", params=parameters) as response:
            async for chunk in response.aiter_bytes():
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    limit = f"{MAX_BODY_BYTES / 1e6:.0f} MB"
                    raise QueryError(f"the result is larger than {limit}; choose a shorter range")
        return b"".join(chunks)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self._waiting >= MAX_WAITING:
            raise BusyError(f"{self._waiting} queries are waiting; try again later")
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._slots.release()


def _matrix(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if data["resultType"] != "matrix":
        raise QueryError(f"the query has a result of type {data['resultType']}")
    result: list[Mapping[str, Any]] = data["result"]
    return result


def _align(series: Mapping[str, Any], times: TimeRange) -> Series:
    values: list[float | None] = [None] * times.points
    for time, text in series["values"]:
        index = round((float(time) - times.start) / times.step)
        if 0 <= index < times.points:
            values[index] = _number(text)
    return Series(series["metric"], values)


def _number(text: str) -> float | None:
    """Return the number; None for NaN and infinities, which JSON lacks."""
    value = float(text)
    return value if math.isfinite(value) else None
