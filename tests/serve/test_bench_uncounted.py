"""The router without metrics that ``bench metrics`` compares with."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from benchmarks.metrics.uncounted import uncounted
from tests import asgi
from tests.serve.gateway_kit import CHAT, gateway_world, metrics


@pytest.fixture(autouse=True)
def clocks() -> Iterator[None]:
    """Give modules their clocks back."""
    yield
    patch.stopall()


async def test_a_router_without_metrics_answers_and_counts_nothing() -> None:
    with uncounted():
        async with gateway_world() as world:
            await world.add("gen", "gen-1")
            call = asgi.start(world.app, "POST", CHAT, {"model": "gen", "stream": True})
            assert (await call.done()).status == 200
            found = await metrics(world)
            assert not [series for series in found if series[0] == "tandem_requests_total"]
            assert not found["tandem_ttft_seconds_count", "gen"]
