"""The scenario's server as ``tandem up`` starts it, asked over one connection a request."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from benchmarks.endpoint import Endpoint
from benchmarks.overload.engine import generator, write_tenants
from benchmarks.overload.outcome import Ask
from benchmarks.overload.scenario import BODY, Scenario
from benchmarks.targets.running import MODEL
from benchmarks.targets.tandem import tandem_of

_ANSWER_S = 60.0


@asynccontextmanager
async def running() -> AsyncIterator[Ask]:
    """How to ask it."""
    with _started() as endpoints:

        async def ask(tenant: str, tokens: int) -> int:
            return await _ask(endpoints[tenant], tokens)

        yield ask


@contextmanager
def _started() -> Iterator[dict[str, Endpoint]]:
    """Where each tenant asks."""
    with tempfile.TemporaryDirectory(prefix="bench-overload-") as folder:
        path = Path(folder) / "keys.yaml"
        keys = write_tenants(path)
        pools = {"generators": [generator()]}
        with tandem_of(pools, MODEL, {"keys_file": str(path)}) as cluster:
            yield {tenant: _endpoint(cluster.endpoint, key) for tenant, key in keys.items()}


def _endpoint(endpoint: Endpoint, key: str) -> Endpoint:
    headers = {
        "x-api-key": key,
        "x-request-timeout-seconds": str(Scenario().deadline_s),
        "connection": "close",
    }
    return Endpoint(endpoint.port, endpoint.model, headers, endpoint.host)


async def _ask(endpoint: Endpoint, tokens: int) -> int:
    """The answer's status; 0 where there is no whole answer."""
    body = {**BODY, "model": endpoint.model, "max_tokens": tokens}
    request = endpoint.request("/v1/completions", body)
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            try:
                writer.write(request)
                answer = await reader.read(-1)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0
    status = answer[9:12]
    return int(status) if answer.startswith(b"HTTP/1.1 ") and status.isdigit() else 0
